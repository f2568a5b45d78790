"""Which hidden units matter: The Incredible Shrinking Neural Network (arXiv 1701.04465), run again.

Its MNIST is Fashion-MNIST here, which `fashion_mnist.py` says how to get; plots need `pip install
matplotlib`.

    python benchmarks/neuron_ranking.py --data fashion/usr/share/datasets/fashion-mnist

With `--quick` everything is small, ends within a minute and is printed instead of written.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import read_part
from torch import Tensor, nn
from torch.func import vmap

import graphprune as gp
from graphprune.calibration import Batch, batches_of
from graphprune.capture import capture
from graphprune.groups import DependencyGraph
from graphprune.importance import Subject, loss_based, scores
from graphprune.importance.gates import GatedLoss
from graphprune.inference import infer
from graphprune.inputs import Inputs, call
from graphprune.layout import Axis, Mask
from graphprune.verify import without

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "graphprune"
from matplotlib import pyplot as plt  # noqa: E402

BATCH = 500  # images that are looked at at once
CRITERIA = ("oracle", "taylor2", "taylor2_recursion", "taylor", "l2")
NAMES = {
    "oracle": "brute force",
    "taylor2": "2nd, exact",
    "taylor2_recursion": "2nd, recursion",
    "taylor": "1st",
    "l2": "l2 norm",
    "random": "random",
}
HOW = ("iterative", "single")
AT = range(10, 90, 10)

# Accuracy that the paper reports where its x axis reads 10, 20 ... 80, by network, criterion and ranking.
PAPER = {
    ("1x100", "oracle", "iterative"): (0.994, 0.991, 0.986, 0.984, 0.983, 0.956, 0.892, 0.786),
    ("1x100", "taylor2_recursion", "iterative"): (
        0.984, 0.930, 0.910, 0.827, 0.804, 0.741, 0.672, 0.361,
    ),
    ("1x100", "taylor", "iterative"): (0.944, 0.848, 0.661, 0.580, 0.323, 0.269, 0.109, 0.182),
    ("1x100", "oracle", "single"): (0.990, 0.963, 0.856, 0.676, 0.487, 0.311, 0.464, 0.344),
    ("1x100", "taylor2_recursion", "single"): (
        0.963, 0.928, 0.834, 0.788, 0.654, 0.543, 0.479, 0.358,
    ),
    ("1x100", "taylor", "single"): (0.960, 0.783, 0.698, 0.672, 0.605, 0.421, 0.370, 0.414),
    ("2x50", "oracle", "iterative"): (0.996, 0.994, 0.983, 0.962, 0.932, 0.886, 0.691, 0.586),
    ("2x50", "taylor2_recursion", "iterative"): (
        0.917, 0.718, 0.622, 0.613, 0.420, 0.218, 0.104, 0.100,
    ),
    ("2x50", "taylor", "iterative"): (0.952, 0.802, 0.517, 0.422, 0.202, 0.217, 0.259, 0.173),
    ("2x50", "oracle", "single"): (0.973, 0.891, 0.594, 0.419, 0.330, 0.135, 0.091, 0.100),
}  # fmt: skip
# Units that the paper's networks lose before accuracy has dropped by 1, 2 and 5 points.
PAPER_REMOVABLE = {
    ("1x100", "oracle", "iterative"): (35, 53, 63),
    ("1x100", "taylor2_recursion", "iterative"): (4, 16, 20),
    ("1x100", "taylor", "iterative"): (4, 6, 10),
    ("2x50", "oracle", "iterative"): (26, 35, 43),
    ("2x50", "taylor2_recursion", "iterative"): (4, 6, 6),
    ("2x50", "taylor", "iterative"): (3, 8, 11),
}
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


# ---------------------------------------------------------------------------- networks and data


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

    def subject(self, module: nn.Module, seed: int = 0) -> Subject:
        """Return what is to be scored: the network, or what is left of it."""
        return Subject(module, self.graph, self.batches(), squared, seed)

    def without(self, gone: Sequence[tuple[str, int]]) -> nn.Module:
        """Return the network with units silenced: what they feed is zero, biases stay."""
        masks: dict[Axis, Mask] = {}
        for group in self.graph.groups:
            slots = [slot for name, slot in gone if name == group.name]
            if slots:
                masks[group.axis] = ~np.isin(np.arange(group.size), slots)
        return without(self.module, self.graph.inference, masks)

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


# ------------------------------------------------------------------------------ ranking and removal


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


def mean(curves: Sequence[Curve], of: str) -> Any:
    return np.mean([getattr(curve, of) for curve in curves], axis=0)


def spread(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


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


# ------------------------------------------------------------------------------ what the tables say


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracies(curves: Curves) -> str:
    rows = []
    for (net, criterion, how), of_seeds in curves.items():
        ours = mean(of_seeds, "accuracy")
        count = len(ours) - 1
        rows.append(
            [net, NAMES[criterion], how, "here"] + [f"{ours[count * at // 100]:.3f}" for at in AT]
        )
        if (net, criterion, how) in PAPER:
            paper = [f"{value:.3f}" for value in PAPER[net, criterion, how]]
            rows.append(["", "", "", "paper", *paper])
    return table(["net", "criterion", "ranking", "", *(f"{at} %" for at in AT)], rows)


def removables(curves: Curves) -> str:
    rows = []
    for key, of_seeds in curves.items():
        net, criterion, how = key
        ours = [spread([curve.within(points) for curve in of_seeds]) for points in (1, 2, 5)]
        paper = [str(count) for count in PAPER_REMOVABLE.get(key, ("", "", ""))]
        rows.append([net, NAMES[criterion], how, *ours, *paper])
    lost = [f"{points} point{'s' * (points > 1)}" for points in (1, 2, 5)]
    return table(["net", "criterion", "ranking", *lost, *(f"paper, {one}" for one in lost)], rows)


def share_of_last_layer(curve: Curve, net: Net) -> float:
    """Return how many of the first quarter of the units that go are of the last hidden layer."""
    last, count = net.graph.groups[-1].name, len(net.units) // 4
    return sum(name == last for name, _ in curve.order[:count]) / count


def area(curves: Curves, key: tuple[str, str, str], until: int) -> float:
    """Return the mean accuracy over removals, up to a share of the units in percent."""
    accuracy = mean(curves[key], "accuracy")
    count = (len(accuracy) - 1) * until // 100
    return float(np.mean(accuracy[1 : count + 1]))


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


# ---------------------------------------------------------------------------------- the other looks


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
    subject = Subject(model, graph, net.batches(), squared)
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


# --------------------------------------------------------------------------------------- the result


@dataclass
class Found:
    """All that was measured."""

    size: Size
    nets: dict[str, list[Net]]
    curves: Curves
    same: bool
    cosines: list[Cosine]
    gains: Gains
    pairs: dict[str, list[list[str]]]
    under_trained: list[UnderTrained]
    timings: dict[str, Timing]


def claims(found: Found) -> list[list[str]]:
    """Return, for each claim, what was measured and whether it held by the rule given."""
    curves = found.curves

    def within(net: str, criterion: str, points: float = 5) -> float:
        of_seeds = curves[net, criterion, "iterative"]
        share: float = np.mean([100 * c.within(points) / len(c.order) for c in of_seeds])
        return share

    def first_of(net: str, until: int) -> tuple[float, float]:
        a, b = (area(curves, (net, c, "iterative"), until) for c in ("taylor", "taylor2_recursion"))
        return a, b

    def last_layer(criterion: str) -> float:
        of_seeds = zip(curves["2x50", criterion, "iterative"], found.nets["2x50"], strict=True)
        return float(np.mean([share_of_last_layer(curve, net) for curve, net in of_seeds]))

    brute = [within(net, "oracle") for net in ("1x100", "2x50")]
    orders = [within(net, c) for net in ("1x100", "2x50") for c in ("taylor", "taylor2_recursion")]
    first, second = first_of("1x100", 80)
    early, late = first_of("2x50", 25)
    layers = {c: last_layer(c) for c in ("oracle", "taylor", "taylor2_recursion")}
    better = {
        (net, c): area(curves, (net, c, "iterative"), 80) - area(curves, (net, c, "single"), 80)
        for net in ("1x100", "2x50")
        for c in ("oracle", "taylor2_recursion", "taylor")
    }
    harder = {c: (within("1x100", c), within("2x50", c)) for c in CRITERIA[:4] if c != "taylor2"}
    essential = {
        f"{cosine.trained_by} 2x{cosine.width}": float(
            np.median([cosine.essential(c, 0.01) for c in cosine.curves])
        )
        for cosine in found.cosines
    }
    by_adam = [left for name, left in essential.items() if name.startswith("Adam")]
    falls = {
        key: max(curve.rise_and_fall() for curve in of_seeds)
        for key, of_seeds in curves.items()
        if key[1] != "random"
    }
    most = max(falls, key=lambda key: falls[key])
    improved = [min(one.curve.error) < 0.99 * one.curve.error[0] for one in found.under_trained]
    flat = [np.mean(np.abs(g) < 0.01) for g in (found.gains.doubled, found.gains.fourfold)]
    rows = [
        (
            "40 to 70 % of the units can go without major loss (brute force, iterative)",
            f"within 5 points: {brute[0]:.0f} % of 1x100, {brute[1]:.0f} % of 2x50",
            "at least 40 % on both",
            min(brute) >= 40,
        ),
        (
            "first and second order can be relied on for the first 10 to 30 % only",
            "within 5 points, 1st and 2nd: 1x100 {:.0f} and {:.0f} %, 2x50 {:.0f} and {:.0f} %".format(
                *orders
            ),
            "at most 30 % in all four",
            max(orders) <= 30,
        ),
        (
            "second order beats first on 1x100",
            f"mean accuracy up to 80 % removed: 1st {first:.3f}, 2nd {second:.3f}",
            "2nd higher",
            second > first,
        ),
        (
            "first order is the better one on 2x50 for the first quarter",
            f"mean accuracy up to 25 % removed: 1st {early:.3f}, 2nd {late:.3f}",
            "1st higher",
            early > late,
        ),
        (
            "a deeper network is harder to prune",
            "within 5 points, 1x100 and 2x50: "
            + ", ".join(f"{NAMES[c]} {a:.0f} and {b:.0f} %" for c, (a, b) in harder.items()),
            "2x50 lower for all three",
            all(b < a for a, b in harder.values()),
        ),
        (
            "brute force takes from the layer nearest the output first",
            f"2x50: {layers['oracle']:.0%} of the first quarter removed are of the last hidden layer",
            "over two thirds",
            layers["oracle"] > 2 / 3,
        ),
        (
            "first and second order have no preference for a layer",
            f"the same for 1st {layers['taylor']:.0%}, 2nd {layers['taylor2_recursion']:.0%}",
            "both between one and two thirds",
            all(1 / 3 <= layers[c] <= 2 / 3 for c in ("taylor", "taylor2_recursion")),
        ),
        (
            "iterative re-ranking beats a single ranking",
            "mean accuracy up to 80 % removed, gain: "
            + ", ".join(f"{net} {NAMES[c]} {gain:+.3f}" for (net, c), gain in better.items()),
            "higher for all six",
            all(gain > 0 for gain in better.values()),
        ),
        (
            "the cosine needs about as many units wherever pruning starts",
            "units left at 1 % error, median, by start: "
            + ", ".join(f"{name} {left:.0f}" for name, left in essential.items()),
            "Adam: largest at most 1.5 times the smallest",
            max(by_adam) <= 1.5 * min(by_adam),
        ),
        (
            "error rises and falls again as more units go",
            f"the deepest fall is {falls[most]:.0%} of the error before it "
            f"({most[0]}, {NAMES[most[1]]}, {most[2]})",
            "over 10 %",
            falls[most] > 0.1,
        ),
        (
            "networks that were not trained to the end improve when pruned (brute force)",
            f"{sum(improved)} of {len(improved)} get an error lower by over 1 %",
            "all",
            all(improved),
        ),
        (
            "some units can be doubled to quadrupled without a change of error",
            f"1x100: error within 1 % for {flat[0]:.0%} of the units doubled, {flat[1]:.0%} fourfold",
            "any fourfold",
            flat[1] > 0,
        ),
    ]
    return [[what, seen, rule, "held" if held else "not held"] for what, seen, rule, held in rows]


def facts(found: Found) -> str:
    size = found.size
    start = {
        name: ", ".join(f"{net.measured(net.module)[0]:.2%}" for net in nets)
        for name, nets in found.nets.items()
    }
    forms = ["-".join(map(str, (400, *hidden, 10))) for hidden in size.hidden.values()]
    rows = [
        ("date", str(datetime.date.today())),
        (
            "versions",
            f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"matplotlib {matplotlib.__version__}",
        ),
        (
            "machine",
            f"{platform.machine()}, {os.cpu_count()} cores, one thread used, shared with other work",
        ),
        ("data", f"the first {size.images:,} training images, 20 x 20 (area means), pixels 0 to 1"),
        (
            "networks",
            f"{' and '.join(forms)}, sigmoid outputs, {size.seeds} of each, seeds from 0; half the "
            f"squared error; Adam, until 99.8 % or {size.epochs} epochs",
        ),
        (
            "accuracy at the start",
            f"1x100 {start['1x100']} (paper 99.8 %); 2x50 {start['2x50']} (paper 100 %)",
        ),
        ("precision", "trained in float32, all else in float64"),
    ]
    return table(["", ""], rows)


def of_recursion(found: Found) -> str:
    head = ["net", "seed", "hidden layer", "off, median", "off, most"]
    head += ["rank correlation: 1st", "2nd, recursion", "2nd, exact"]
    rows = [
        [name, str(seed), *row]
        for name, nets in found.nets.items()
        for seed, net in enumerate(nets)
        for row in recursion_against_exact(net)
    ]
    return table(head, rows)


def of_cosines(found: Found) -> str:
    shares = (0.001, 0.01, 0.1)
    rows = []
    for cosine in found.cosines:
        start = ", ".join(f"{c.error[0]:.0e}" for c in cosine.curves)
        left = [", ".join(str(cosine.essential(c, s)) for c in cosine.curves) for s in shares]
        rows.append([f"2x{cosine.width}", cosine.trained_by, start, *left])
    return table(
        ["net", "trained by", "error at the start", *(f"{share:.1%}" for share in shares)], rows
    )


def of_pairs(found: Found) -> str:
    head = ["net", "seed", "pairs", "negative", "positive", "size over dE_i + dE_j, median"]
    head += ["90th percentile", "cancelling", "dE_ij < 0", "dE_i < 0"]
    rows = [[name, str(n), *row] for name, own in found.pairs.items() for n, row in enumerate(own)]
    return table(head, rows)


def of_falls(found: Found) -> str:
    rows = []
    for (name, criterion, how), of_seeds in found.curves.items():
        if criterion != "random":
            falls = ", ".join(f"{curve.rise_and_fall():.0%}" for curve in of_seeds)
            rows.append([name, NAMES[criterion], how, falls])
    return table(["net", "criterion", "ranking", "one a network"], rows)


def of_under_trained(found: Found) -> str:
    head = ["net", "accuracy", "at the least error", "error", "least (removed)", "not above until"]
    head += ["all removed", "paper: error", "least (removed)", "not above until"]
    return table(head, [one.row() for one in found.under_trained])


def of_timing(found: Found) -> str:
    head = ["net", "one by one", "one by one in batches", "oracle", "ratio", "ratio in batches"]
    rows = [[name, *one.row()] for name, one in found.timings.items()]
    return table([*head, "apart, at most"], rows)


def written(found: Found) -> str:
    """Return the result file."""
    size = found.size
    adam = size.steps // 2 * 5  # five batches an epoch
    return f"""# The Incredible Shrinking Neural Network, run again

    python benchmarks/neuron_ranking.py --data fashion/usr/share/datasets/fashion-mnist

Wolfe et al., arXiv 1701.04465, on Fashion-MNIST instead of MNIST.

{facts(found)}

Accuracy is that on the images of training and ranking, as in the paper. Nothing is trained after a
removal. Units are taken one by one by the library's scores; that these are the units which
`slimmed(..., ranking="global", steps=...)` takes was checked for half of one 1x100, first order,
iterative: {"the same units" if found.same else "OTHER UNITS"}.

## The paper's claims

The rules were written for this table. Where there are several networks, their mean counts.

{table(["claim", "measured here", "counts as held if", ""], claims(found))}

## Accuracy by share of units removed

Means over the networks; for random, over five orders of each. The paper's figures are read off its
plots, whose x axis counts from the first removal, so that its 10 % is 11 units.

{accuracies(found.curves)}

![accuracy and error](neuron_ranking_curves.svg)

## Units removed before accuracy is lower by more than 1, 2, 5 points

From the lowest to the highest of the networks, of {len(found.nets["1x100"][0].units)} units.

{removables(found.curves)}

## What the recursion costs

Second-order terms of the paper's recursion against the exact diagonal of the Hessian, before any
removal: the share by which a unit's term is off. Beside it, how scores correlate with those of brute
force by rank.

{of_recursion(found)}

## The cosine

500 points from 0 to 2 pi, two hidden layers of sigmoids, a linear output, float64; {adam:,} steps of
Adam or up to {size.steps:,} of L-BFGS; one figure a network, seeds from 0. Brute force, iterative:
units left of both layers together before the error exceeds a share of that of an output of zero, all
where it does from the start.

{of_cosines(found)}

![cosine](neuron_ranking_cos.svg)

## Gain

Error of the first 1x100 against a factor on the output of one unit, for every tenth unit that brute
force, iterative, removes.

![gains](neuron_ranking_gains.svg)

## Pairs of units

Change of error without two units, dE_ij, less dE_i + dE_j without each. Positive: together they cost
more than one by one. Cancelling: dE_ij is below the greater of dE_i and dE_j, so that once the dearer
unit is gone, error falls when the other goes too.

{of_pairs(found)}

Share of the error by which it falls again, at most, after a rise, as units are removed:

{of_falls(found)}

## Networks that were not trained to the end

Brute force, iterative; one network each. The first three are like the paper's: softmax outputs,
pixels 0 to 255, one class against the rest; five epochs of Adam here.

{of_under_trained(found)}

## Brute force, batched

Seconds for the change of error without each unit, over all images, in float64: a forward pass of the
whole network a unit, over all images at once or in batches of {BATCH}, and the criterion "oracle" on
the same batches, {loss_based.CHUNK} units side by side. Medians of {size.repeats}, in turn, in one
run. The last column is the difference of the results over the change.

{of_timing(found)}
"""


# ---------------------------------------------------------------------------------------- the plots


def plot(found: Found, folder: Path) -> None:
    plot_curves(found, folder / "neuron_ranking_curves.svg")
    plot_cosines(found.cosines, folder / "neuron_ranking_cos.svg")
    figure, axes = plt.subplots(figsize=(7, 4))
    colours = plt.get_cmap("viridis")
    for place, error in found.gains.of_unit.items():
        colour = colours(place / max(found.gains.of_unit))
        axes.plot(found.gains.factors, error, color=colour, label=f"{place} removed before it")
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set(yscale="log", xlabel="factor on the unit's output", ylabel="squared error")
    axes.legend(fontsize=7)
    _save(figure, folder / "neuron_ranking_gains.svg")


def plot_curves(found: Found, path: Path) -> None:
    figure, grid = plt.subplots(2, 4, figsize=(16, 7), sharex=True, sharey="row")
    columns = [(net, how) for net in found.nets for how in HOW]
    for (net, how), (top, bottom) in zip(columns, grid.T, strict=True):
        for number, criterion in enumerate((*CRITERIA, "random")):
            of_seeds = found.curves.get((net, criterion, how))
            if of_seeds:
                for axes, of in ((top, "accuracy"), (bottom, "error")):
                    axes.plot(mean(of_seeds, of), color=f"C{number}", label=NAMES[criterion])
        top.set(title=f"{net}, {how} ranking", ylabel="accuracy")
        bottom.set(xlabel="units removed", ylabel="squared error", yscale="log")
    grid[0, 1].legend(fontsize=8)
    _save(figure, path)


def plot_cosines(of_all: Sequence[Cosine], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for cosine in of_all:
        ends = [cosine.essential(curve, 0.01) for curve in cosine.curves]
        by_adam = cosine.trained_by == "Adam"
        marker, first = "o" if by_adam else "x", cosine.width == of_all[0].width
        label = cosine.trained_by if first else None
        right.plot([cosine.width] * len(ends), ends, marker, color=f"C{by_adam:d}", label=label)
        for number, curve in enumerate(cosine.curves if by_adam else ()):
            label = None if number else f"2x{cosine.width}"
            units = range(len(curve.order), -1, -1)
            left.plot(units, curve.error, color=f"C{of_all.index(cosine)}", label=label)
    left.set(yscale="log", xlabel="units left", ylabel="squared error", title="Adam, brute force")
    left.invert_xaxis()
    left.legend()
    right.set(xlabel="units a layer at the start", ylabel="units left at 1 % error", ylim=(0, None))
    right.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def measured(folder: Path, size: Size) -> Found:
    x, labels = images(folder, size.images, 20)
    t = F.one_hot(labels, 10).float()
    models: dict[str, list[nn.Module]] = {}
    nets: dict[str, list[Net]] = {}
    for name, hidden in size.hidden.items():
        for seed in range(size.seeds):
            model = sigmoid_net((400, *hidden, 10), nn.Sigmoid(), seed)
            train(model, x, t, size.epochs, 1e-2, seed, goal=0.998)
            net = Net.of(model, x, t)
            accuracy, error = net.measured(net.module)
            log(f"{name}, seed {seed}: accuracy {accuracy:.2%}, squared error {error:.1f}")
            models.setdefault(name, []).append(model)
            nets.setdefault(name, []).append(net)
    timings = {
        name: timing(models[name][0], of_seeds[0], size.repeats) for name, of_seeds in nets.items()
    }
    log("brute force:", timings)
    same = same_as_the_library(nets["1x100"][0])
    log("slimmed removes the same units:", same)
    of_cosine: list[Cosine] = list(cosines(size))
    early = []
    for one in under_trained(folder, size):
        log("under-trained:", *one.row())
        early.append(one)
    curves = all_curves(nets)
    by_brute_force = curves["1x100", "oracle", "iterative"][0]
    of_units = gains(nets["1x100"][0], by_brute_force)
    both = {name: [pairs(net) for net in of_seeds] for name, of_seeds in nets.items()}
    log("pairs:", both)
    return Found(size, nets, curves, same, of_cosine, of_units, both, early, timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *-ubyte.gz files")
    parser.add_argument("--quick", action="store_true", help="small, printed, under a minute")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = measured(options.data, QUICK if options.quick else FULL)
    text = written(found)
    if options.quick:
        print(text)
    else:
        (options.output / "neuron_ranking.md").write_text(text)
        plot(found, options.output)
    log(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
