"""What neuron_ranking.py measures: networks whose units go one by one, and what else it looks at."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import read_part
from torch import Tensor, nn
from torch.func import vmap

import graphprune as gp
from graphprune.calibration.batches import Batch, batches_of
from graphprune.capture.capture import capture
from graphprune.importance import ScoringContext, scores
from graphprune.importance.gated_loss import GatedLoss
from graphprune.inference.infer import infer
from graphprune.inspection.dependency_graph import DependencyGraph
from graphprune.layout import Axis
from graphprune.masks import Mask
from graphprune.utils.inputs import Inputs, call
from graphprune.verify import copy_with_slots_zeroed

BATCH = 500  # images that are looked at at once


CRITERIA = ("oracle", "taylor2", "taylor2_recursion", "taylor", "l2")


HOW = ("iterative", "single")


PAPER_UNDER_TRAINED = {0: (2756, 2038, 51, 78), 1: (2132, 1408, 46, 82), 2: (5651, 3551, 50, 98)}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        images: of the training set, the first.
        hidden: the hidden layers of the two networks.
        epochs: passes over the images.
        seeds: networks trained of each kind, and of each width for the cosine.
        widths: units a layer in the networks that learn the cosine.
        steps: of L-BFGS for the cosine; Adam takes five for every two.
        repeats: of each measurement of time.

    """

    images: int
    hidden: dict[str, tuple[int, ...]]
    epochs: int
    seeds: int
    widths: tuple[int, ...]
    steps: int
    repeats: int


FULL = Size(5000, {"1x100": (100,), "2x50": (50, 50)}, 600, 3, (10, 20, 50, 100), 2000, 7)


QUICK = Size(1000, {"1x100": (20,), "2x50": (10, 10)}, 300, 1, (5, 10), 300, 3)


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Return half the squared error, summed."""
    return (output - target).square().sum() / 2


def log(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


@dataclass
class Net:
    """A trained network as a graph, in float64, and the data that it was trained on.

    Attributes:
        module: calls ATen operators; traced once, since it is scored hundreds of times.
        graph: its groups, one a hidden layer, first layer first.
        x: inputs.
        t: targets.
        gates: the loss with a gate a unit.
        units: group and slot of every unit.

    """

    module: nn.Module
    graph: DependencyGraph
    x: Tensor
    t: Tensor
    gates: GatedLoss = field(init=False)
    units: list[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.gates = GatedLoss(self.subject(self.module))
        self.units = [(g.name, slot) for g in self.graph.groups for slot in range(g.size)]

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, t: Tensor) -> Net:
        """Return a trained model, which is made float64, as a graph with its groups."""
        double, inputs = model.double().eval(), Inputs(x[:10].double())
        module = capture(double, inputs)
        return cls(module, DependencyGraph(infer(module, inputs)), x.double(), t.double())

    def batches(self) -> list[Batch]:
        """Return inputs and targets in batches."""
        return batches_of(list(zip(self.x.split(BATCH), self.t.split(BATCH), strict=True)))

    def subject(self, module: nn.Module, seed: int = 0) -> ScoringContext:
        """Return what is to be scored: the network, or what is left of it."""
        return ScoringContext(module, self.graph, self.batches(), squared, seed)

    def without(self, gone: Sequence[tuple[str, int]]) -> nn.Module:
        """Return the network with units silenced: what they feed is zero, biases stay."""
        masks: dict[Axis, Mask] = {}
        for group in self.graph.groups:
            slots = [slot for name, slot in gone if name == group.name]
            if slots:
                masks[group.axis] = ~np.isin(np.arange(group.size), slots)
        return copy_with_slots_zeroed(self.module, self.graph.inference, masks)

    def measured(self, module: nn.Module) -> tuple[float, float]:
        """Return accuracy, by the highest output, and squared error."""
        output = call(module, Inputs(self.x))
        right = (output.argmax(1) == self.t.argmax(1)).double().mean()
        return float(right), float(squared(output, self.t))

    def errors(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Return the squared error for each of many gates, `[count, units]` by group."""
        total: Tensor = torch.zeros(())
        with torch.no_grad():
            for batch in self.batches():
                own = batch
                total = total + vmap(
                    lambda gates, own=own: self.gates(gates, own.inputs, own.target),
                    chunk_size=100,
                )(dict(factors))
        return total

    def gates_of(self, given: Sequence[Mapping[int, float]]) -> dict[str, Tensor]:
        """Return gates from, for each of many, the factors of units by number."""
        all_units = torch.ones(len(given), len(self.units), dtype=torch.float64)
        for row, factors in enumerate(given):
            for unit, factor in factors.items():
                all_units[row, unit] = factor
        sizes = [group.size for group in self.graph.groups]
        parts = all_units.split(sizes, dim=1)
        return {g.name: part for g, part in zip(self.graph.groups, parts, strict=True)}


def sigmoid_net(sizes: Sequence[int], last: nn.Module, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1], last)


def images(folder: Path, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Return the first training images, pixels 0 to 1, as vectors of `side * side`, and their labels."""
    pixels, labels = read_part(folder, "train")
    x = F.interpolate(pixels[:count, None].float() / 255, size=(side, side), mode="area")
    return x.flatten(1), labels[:count].long()


def train(
    model: nn.Module, x: Tensor, t: Tensor, epochs: int, peak: float, seed: int, goal: float = 1.0
) -> None:
    """Train by Adam with one cycle of the learning rate, up to an accuracy."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=peak)
    steps = epochs * -(-len(x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(100):
            loss = squared(model(x[chosen]), t[chosen]) / 100
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            if (model(x).argmax(1) == t.argmax(1)).double().mean() >= goal:
                return


@dataclass
class Curve:
    """What is left of a network while units go, from none to all.

    Attributes:
        order: the units in the order in which they went.
        accuracy: after 0, 1, 2 ... units.
        error: squared error after 0, 1, 2 ... units.

    """

    order: list[tuple[str, int]]
    accuracy: list[float]
    error: list[float]

    def within(self, points: float) -> int:
        """Return how many units go before accuracy is lower by more than so many points."""
        least = self.accuracy[0] - points / 100 - 1e-9
        return next((n for n, a in enumerate(self.accuracy) if a < least), len(self.accuracy)) - 1

    def rise_and_fall(self) -> float:
        """Return how far error falls again after its highest so far, over that."""
        highest = np.maximum.accumulate(self.error)
        return float(((highest - self.error) / highest).max())


def removed(net: Net, criterion: str, how: str, seed: int = 0) -> Curve:
    """Take unit after unit, of all layers together, the lowest score first.

    Iterative re-ranking scores what is left before each removal, a single ranking once.
    """
    left = net.module
    gone: list[tuple[str, int]] = []
    curve = Curve(gone, *([value] for value in net.measured(left)))
    found: Mapping[str, Any] = {}
    for step in range(len(net.units)):
        if how == "iterative" or step == 0:
            found = scores(net.subject(left, seed), criterion)
        candidates = [unit for unit in net.units if unit not in set(gone)]
        gone.append(min(candidates, key=lambda unit: found[unit[0]][unit[1]]))
        left = net.without(gone)
        accuracy, error = net.measured(left)
        curve.accuracy.append(accuracy)
        curve.error.append(error)
    return curve


Curves = dict[tuple[str, str, str], list[Curve]]


def all_curves(nets: Mapping[str, Sequence[Net]]) -> Curves:
    """Return the curves of each network, criterion and ranking, one a seed."""
    found: Curves = {}
    for name, of_seeds in nets.items():
        for criterion in CRITERIA:
            for how in HOW:
                started = time.perf_counter()
                found[name, criterion, how] = [removed(net, criterion, how) for net in of_seeds]
                seconds = time.perf_counter() - started
                log(f"{name} {criterion} {how}: {seconds:.0f} s")
        found[name, "random", "single"] = [
            removed(net, "random", "single", seed) for net in of_seeds for seed in range(5)
        ]
    return found


def same_as_the_library(net: Net) -> bool:
    """Say whether half the units that `slimmed` removes one a step are those of `removed`."""
    curve = removed(net, "taylor", "iterative")
    count = len(net.units) // 2
    ratio = count / len(net.units) - 1e-9  # no step may take two for the rounding of its ratio
    plan = gp.slimmed(
        net.module, ratio, net.x[:10], importance="taylor", ranking="global", steps=count, align=1,
        data=list(zip(net.x.split(BATCH), net.t.split(BATCH), strict=True)), loss=squared,
    ).plan  # fmt: skip
    kept = {(name, slot) for name, slots in plan.keep.items() for slot in slots}
    return kept == set(net.units) - set(curve.order[:count])


def recursion_against_exact(net: Net) -> list[str]:
    """Return a row a layer: how far the recursion's second-order terms are from the exact ones."""
    first, exact, recursion = (
        scores(net.subject(net.module), c) for c in ("taylor", "taylor2", "taylor2_recursion")
    )
    oracle = scores(net.subject(net.module), "oracle")
    rows = []
    for number, group in enumerate(net.graph.groups, 1):
        name = group.name
        off = np.abs((recursion[name] - first[name]) / (exact[name] - first[name]) - 1)
        ranks = [
            f"{rank_correlation(of[name], oracle[name]):.2f}" for of in (first, recursion, exact)
        ]
        rows.append([f"{number}", f"{np.median(off):.1e}", f"{off.max():.1e}", *ranks])
    return rows  # type: ignore[return-value]


def rank_correlation(a: Any, b: Any) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(np.stack(ranks))[0, 1])


@dataclass
class Cosine:
    """Networks of one width that learnt the cosine, without units by brute force, one a seed."""

    trained_by: str
    width: int
    curves: list[Curve]
    of_zero: float

    def essential(self, curve: Curve, share: float) -> int:
        """Return how many units are left before error exceeds a share of that of an output of zero."""
        over = next(n for n, error in enumerate(curve.error) if error > share * self.of_zero)
        return min(len(curve.error) - over, len(curve.order))


def cosine_net(trained_by: str, width: int, seed: int, steps: int) -> Net:
    x = torch.linspace(0, 2 * math.pi, 500).double().unsqueeze(1)
    t = x.cos()
    model = sigmoid_net((1, width, width, 1), nn.Identity(), seed).double()
    if trained_by == "Adam":
        train(model, x, t, steps // 2, 1e-2, seed, goal=math.inf)
        return Net.of(model, x, t)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = squared(model(x), t)
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return Net.of(model, x, t)


def cosines(size: Size) -> Iterator[Cosine]:
    for trained_by, width in product(("Adam", "L-BFGS"), size.widths):
        nets = [cosine_net(trained_by, width, seed, size.steps) for seed in range(size.seeds)]
        zero = float(nets[0].t.square().sum() / 2)
        curves = [removed(net, "oracle", "iterative") for net in nets]
        log(f"cos 2x{width}, {trained_by}: start {[f'{c.error[0]:.1e}' for c in curves]}")
        yield Cosine(trained_by, width, curves, zero)


@dataclass
class Gains:
    """Squared error against a factor on one unit's output."""

    factors: list[float]
    of_unit: dict[int, Any]  # by how many units went before it
    doubled: list[float]  # change of error, over the error, for every unit
    fourfold: list[float]


def gains(net: Net, curve: Curve) -> Gains:
    factors = [step / 10 for step in range(101)]
    of_unit = {}
    for place in range(0, len(curve.order), len(curve.order) // 10):
        unit = net.units.index(curve.order[place])
        of_unit[place] = net.errors(net.gates_of([{unit: f} for f in factors])).numpy()
    now = net.errors(net.gates_of([{}]))
    doubled, fourfold = (
        ((net.errors(net.gates_of([{unit: f} for unit in range(len(net.units))])) - now) / now)
        for f in (2.0, 4.0)
    )
    return Gains(factors, of_unit, doubled.tolist(), fourfold.tolist())


def pairs(net: Net) -> list[str]:
    """Return a row: what the loss does without two units, beyond what it does without each."""
    count = len(net.units)
    both = list(combinations(range(count), 2))
    now = net.errors(net.gates_of([{}]))
    single = net.errors(net.gates_of([{unit: 0.0} for unit in range(count)])) - now
    double = net.errors(net.gates_of([{a: 0.0, b: 0.0} for a, b in both])) - now
    first, second = (single[torch.tensor(side)] for side in zip(*both, strict=True))
    beyond = double - first - second
    relative = beyond.abs() / (first + second).abs()
    cancelling = double < torch.maximum(first, second)
    return [
        f"{len(both):,}",
        f"{float((beyond < 0).double().mean()):.1%}",
        f"{float((beyond > 0).double().mean()):.1%}",
        f"{float(relative.median()):.2f}",
        f"{float(relative.quantile(0.9)):.2f}",
        f"{float(cancelling.double().mean()):.1%}",
        f"{float((double < 0).double().mean()):.2%}",
        f"{int((single < 0).sum())} of {count}",
    ]


@dataclass
class UnderTrained:
    """A network whose training was stopped early, and what brute force does to it."""

    name: str
    curve: Curve
    key: int | None = None

    def row(self) -> list[str]:
        """Return what the table says of it, beside the paper."""
        error = self.curve.error
        least = int(np.argmin(error))
        until = max(n for n, value in enumerate(error) if value <= error[0])
        ours = [f"{error[0]:.0f}", f"{error[least]:.0f} ({least})", f"{until}", f"{error[-1]:.0f}"]
        accuracy = [f"{self.curve.accuracy[0]:.3f}", f"{self.curve.accuracy[least]:.3f}"]
        paper = ["", "", ""]
        if self.key is not None:
            start, low, at, still = PAPER_UNDER_TRAINED[self.key]
            paper = [f"{start}", f"{low} ({at})", f"{still}"]
        return [self.name, *accuracy, *ours, *paper]


def under_trained(folder: Path, size: Size) -> Iterator[UnderTrained]:
    hidden = size.hidden["1x100"]
    x, labels = images(folder, size.images, 28)
    for digit in range(3):
        t = F.one_hot((labels == digit).long(), 2).float()
        model = sigmoid_net((784, *hidden, 2), nn.Softmax(1), digit)
        train(model, 255 * x, t, 5, 1e-3, digit)  # pixels as they are, 0 to 255
        net = Net.of(model, 255 * x, t)
        curve = removed(net, "oracle", "iterative")
        yield UnderTrained(f"784-{hidden[0]}-2, class {digit} or not", curve, digit)
    x, labels = images(folder, size.images, 20)
    t = F.one_hot(labels, 10).float()
    for epochs in (2, 5, 10):
        model = sigmoid_net((400, *hidden, 10), nn.Sigmoid(), 0)
        train(model, x, t, epochs, 1e-2, 0)
        curve = removed(Net.of(model, x, t), "oracle", "iterative")
        yield UnderTrained(f"400-{hidden[0]}-10, {epochs} epochs", curve)


@dataclass
class Timing:
    """Seconds for the change of error without each unit.

    Attributes:
        at_once: a forward pass a unit, over all images at once.
        in_batches: the same in the batches that the criterion is given.
        oracle: the criterion.
        apart: how far the criterion is from the forward passes, over those, at most.

    """

    at_once: float
    in_batches: float
    oracle: float
    apart: float

    def row(self) -> list[str]:
        """Return what the table says of it."""
        seconds = [f"{self.at_once:.3f}", f"{self.in_batches:.3f}", f"{self.oracle:.3f}"]
        ratios = [f"{one / self.oracle:.1f}" for one in (self.at_once, self.in_batches)]
        return [*seconds, *ratios, f"{self.apart:.0e}"]


def timing(model: nn.Module, net: Net, repeats: int) -> Timing:
    """Time a forward pass of the whole network for each unit against the criterion "oracle"."""
    graph = gp.analyze(model, net.x[:10])
    readers = [model[2 * number + 2].weight for number in range(len(graph.groups))]  # type: ignore[index]
    subject = ScoringContext(model, graph, net.batches(), squared)
    seconds: list[list[float]] = []
    for _ in range(repeats):
        clock = [time.perf_counter()]
        for images_at_once in (len(net.x), BATCH):
            one_by_one = _without_each(model, readers, net, images_at_once)
            clock.append(time.perf_counter())
        found = scores(subject, "oracle")
        clock.append(time.perf_counter())
        seconds.append([end - start for start, end in pairwise(clock)])
    batched = np.concatenate([found[group.name] for group in graph.groups]) * len(net.batches())
    apart = float(np.abs(batched / one_by_one - 1).max())
    return Timing(*np.median(seconds, axis=0).tolist(), apart)


@torch.no_grad()
def _without_each(model: nn.Module, readers: Sequence[Tensor], net: Net, count: int) -> Any:
    """Return the change of error with each unit's outgoing weights at zero, by a forward pass each."""

    def error() -> float:
        parts = zip(net.x.split(count), net.t.split(count), strict=True)
        return sum(float(squared(model(x), t)) for x, t in parts)

    now, found = error(), []
    for weight in readers:
        for unit in range(weight.shape[1]):
            kept = weight[:, unit].clone()
            weight[:, unit] = 0
            found.append(error() - now)
            weight[:, unit] = kept
    return np.array(found)
