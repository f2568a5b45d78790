"""Layer after layer, in the order of execution: fit the weights that stay to what the original computed.

Two runs keep in step on the same data, the original and the slim model. When the slim one comes to a
layer, its weights are replaced by those that bring its output nearest to the original's (of the
channels that stay); what follows sees the repaired layer. So each layer also makes up for what the
layers before it could not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphprune.calibration.batches import Share
from graphprune.capture.capture import graph_of
from graphprune.compensation.channel_mixing import Mixing
from graphprune.compensation.fitted_layer import FittedLayer
from graphprune.compensation.recurrent import Side, recurrent_nodes, repaired_cells
from graphprune.compensation.sites import Site, followed, sites_of
from graphprune.distributed.process_group import Ranks
from graphprune.errors import InvalidRequestError, listed, warn
from graphprune.graph_utils.linear_layers import Layer, held_by, layers_of
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies
from graphprune.inference.infer import infer
from graphprune.layout import Axis
from graphprune.masks import Mask, mask_of
from graphprune.selection.plan import Plan
from graphprune.shrink.tensors import sliced
from graphprune.utils.inputs import Inputs
from graphprune.utils.progress import track
from graphprune.utils.tensors import evaluating, named_tensors, working_copy

Method: TypeAlias = Literal["least_squares", "constants"]

# Fits where a ReLU follows: each aims at what is left to gain after the one before.
_ROUNDS = 4

# An error smaller than this is none: the layer and what it reads are as they were.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Repaired:
    """What became of one layer.

    Attributes:
        weight: the name of its weight.
        before: squared error of its output against the original's, over that output's square, as far
            as what follows can tell (a ReLU takes all negative values for one), as it was cut.
        after: the same with the weights that it has now.

    """

    weight: str
    before: float
    after: float


@dataclass(frozen=True)
class Compensation:
    """What a repair did, a layer after the other.

    Attributes:
        layers: in the order of their repair.
        output: squared error of the model's output against the original's, over that output's square,
            the mean over batches, as cut and repaired.

    """

    layers: tuple[Repaired, ...]
    output: tuple[float, float] | None = None

    def __str__(self) -> str:
        lines = ["error of each layer's output, as cut and repaired:"]
        lines += [f"  {one.weight}: {one.before:.3g} -> {one.after:.3g}" for one in self.layers]
        if self.output is not None:
            lines.append("error of the model's output: {:.3g} -> {:.3g}".format(*self.output))
        return "\n".join(lines)


def method_of(compensate: bool | str) -> Method | None:
    """Return the method that the argument `compensate` of `slim` means, or None for no repair.

    Raises:
        InvalidRequestError: there is no such method.

    """
    if compensate is False:
        return None
    if compensate is True:
        return "least_squares"
    if compensate not in get_args(Method):
        raise InvalidRequestError(
            f"compensate={compensate!r} must be True, False, 'least_squares' or 'constants'"
        )
    return cast(Method, compensate)


@torch.no_grad()
def compensated(
    original: nn.Module,
    slimmer: nn.Module,
    plan: Plan,
    inputs: Inputs,
    batches: Share | None,
    method: Method = "least_squares",
) -> Compensation:
    """Change the weights of a slim model, in place, so that it does what the original did on the data.

    Both models run on all batches side by side, so that each layer is met once: what is held is what
    they hold at one point of their run, for all batches, and sums of a layer's features squared.

    Args:
        original: the model that was cut.
        slimmer: the slim model; its parameters and batch norm statistics change.
        plan: what was cut.
        inputs: example inputs.
        batches: a few hundred samples, of all processes of a group; targets are not used.
        method: "least_squares" fits weights and biases, "constants" biases alone.

    Raises:
        CaptureError: one of the models cannot be traced.
        InvalidRequestError: there is no data, the models have no weights, or do not run on it, or a batch
            gives NaN or infinite numbers.

    """
    if batches is None:
        raise InvalidRequestError(
            "compensate= repairs on data; pass data=[...], a list of batches or a DataLoader"
        )
    if any(tensor.is_meta for tensor in named_tensors(original).values()):
        raise InvalidRequestError(
            "compensate= needs weights, and this model is on the meta device; load them first"
        )
    wanted, given = graph_of(original, inputs), graph_of(slimmer, inputs)
    graph = Dependencies(infer(wanted, inputs))
    with evaluating(given), evaluating(wanted):
        as_cut = _error_of_output(wanted, given, batches)
        repair = _Repair(wanted, given, graph, plan.masks(graph), batches)
        repaired = tuple(repair.layers(method))
        output = as_cut, _error_of_output(wanted, given, batches)
    if output[1] > max(output[0], _ROUNDING):
        warn(
            f"the repair does more harm than good: the error of the model's output is {output[1]:.3g} of "
            f"its square, and {output[0]:.3g} as cut, on the same data; pass more data, batches whose "
            "numbers are of one size, or leave compensate out"
        )
    if not repaired:
        warn(
            "nothing is repaired: no convolution, linear or recurrent layer of this model reads weights "
            "of its own"
        )
    if given is not slimmer:
        _carry_over(given, slimmer)
    _have_the_same(slimmer, batches.ranks)
    return Compensation(repaired, output)


def _error_of_output(wanted: fx.GraphModule, given: fx.GraphModule, batches: Share) -> float:
    """Return the squared error of what a graph gives over the square of what is wanted.

    It is the mean over batches, so that one with large numbers does not hide the others.
    """
    total, both = 0.0, [cast(fx.GraphModule, working_copy(g)) for g in (wanted, given)]
    for batch in batches:
        pair = [Run(g, batch.inputs, list(g.graph.nodes), what=str(batch)) for g in both]
        missed = whole = 0.0
        for its, mine in zip(*map(_numbers, pair), strict=True):
            finite = its.isfinite() & mine.isfinite() if its.shape == mine.shape else None
            if finite is not None:
                missed += float((mine - its)[finite].double().abs().square().sum())
                whole += float(its[finite].double().abs().square().sum())
        total += missed / whole if whole else 0.0
    return float(batches.mean(total))


def _numbers(run: Run) -> list[Tensor]:
    """Run to the end; return the tensors of real numbers that come out."""
    values = pytree.tree_leaves(run.until(run.order[-1], inclusive=True))
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _carry_over(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Give the model the values of the tensors of a graph that was traced from it."""
    values = named_tensors(graph_module)
    for name, tensor in named_tensors(model).items():
        if name in values and values[name].shape == tensor.shape:
            tensor.copy_(values[name])


def _have_the_same(model: nn.Module, ranks: Ranks) -> None:
    """Give the model the values that it has in rank 0: machines may round in other ways."""
    if ranks.size == 1:
        return
    for tensor in named_tensors(model).values():
        if tensor.is_floating_point():
            values = tensor if ranks.rank == 0 else torch.zeros_like(tensor)
            tensor.copy_(ranks.total([values])[0])


class _Repair:
    """The runs of both models, in step, and the layers that are repaired on the way."""

    def __init__(
        self,
        wanted: fx.GraphModule,
        given: fx.GraphModule,
        graph: Dependencies,
        masks: dict[Axis, Mask],
        batches: Share,
    ) -> None:
        self.batches = batches
        self.wanted, self.given = wanted, given
        self.layouts = graph.inference.nodes
        self.parameters = graph.inference.parameters
        self.masks = masks
        self.originals = layers_of(wanted)
        sites, self.order = sites_of(given)
        self.sites = {site.layer.node: site for site in sites}
        self.wanted_cells, self.given_cells = recurrent_nodes(wanted), recurrent_nodes(given)
        self.recurrent = {cells[0].node: name for name, cells in self.given_cells.items()}
        order = list(wanted.graph.nodes)
        self.wanted_runs = [Run(wanted, b.inputs, order, what=str(b)) for b in batches]
        self.given_runs = [Run(given, b.inputs, self.order, what=str(b)) for b in batches]

    def layers(self, method: Method) -> Iterator[Repaired]:
        """Repair one layer after the other.

        Raises:
            InvalidRequestError: a layer's weights are complex.

        """
        names = [str(site.layer.weight.target) for site in self.sites.values()]
        odd = [name for name in names if named_tensors(self.given)[name].is_complex()]
        if odd:
            raise InvalidRequestError(
                f"compensate= fits real numbers, and {listed(odd)} hold complex ones; leave compensate out"
            )
        for node in track(self.order, "repairing layers"):
            if node in self.sites:
                site = self.sites[node]
                original = self.originals.get(str(site.layer.weight.target))
                if original is not None:
                    yield self.repaired(site, original, method)
            elif node in self.recurrent:
                yield from self.repaired_cells(self.recurrent[node], method)

    def repaired_cells(self, name: str, method: Method) -> Iterator[Repaired]:
        """Fit a recurrent node, found by its first weight in both models."""
        if name not in self.wanted_cells:
            return
        wanted = Side(self.wanted, self.batches, self.wanted_runs, self.wanted_cells[name])
        given = Side(self.given, self.batches, self.given_runs, self.given_cells[name])
        for side in (wanted, given):
            for run in side.runs:
                run.until(side.cells[0].node)
        found = repaired_cells(
            wanted,
            given,
            self.parameters,
            self.masks,
            bias_alone=method == "constants",
        )
        for weight, before, after in found:
            yield Repaired(weight, before, after)

    def repaired(self, site: Site, original: Layer, method: Method) -> Repaired:
        """Fit one layer to what the original has where the site ends."""
        fitted = FittedLayer(site, self.given)
        mixing = self.mixing(original) if method == "least_squares" else None
        read = [self.read(run, original) for run in self.wanted_runs] if mixing else []
        end = _end_of(original, site)
        targets = [self.target(run, end) for run in self.wanted_runs]
        for run in self.given_runs:
            run.until(site.layer.node)
        fitted.aim(self.batches, self.given_runs, targets)
        before = least = fitted.error
        best = [tensor.clone() for tensor in fitted.tensors]
        if mixing is not None and before > _ROUNDING and all(data is not None for data in read):
            self.mix(fitted, original, mixing, cast(list[Tensor], read), targets)
        for _ in range(_ROUNDS if site.bounds != (-math.inf, math.inf) else 1):
            if fitted.error > _ROUNDING:
                least, best = _better(fitted, least, best)
                fitted.fit(bias_alone=method == "constants")
                fitted.aim(self.batches, self.given_runs, targets)
        if fitted.error > least:
            fitted.put_back(best)
            return Repaired(str(site.layer.weight.target), before, least)
        return Repaired(str(site.layer.weight.target), before, fitted.error)

    def mixing(self, original: Layer) -> Mixing | None:
        """Return how the channels of the layer's input may be mixed, where that is worth a try."""
        summed = self.layouts[original.data.name][original.summed]
        return Mixing.of(original, held_by(self.wanted, original.weight), summed, self.masks)

    def mix(
        self,
        fitted: FittedLayer,
        original: Layer,
        mixing: Mixing,
        read: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> None:
        """Start from the original's weights for mixtures of channels, where that is nearer."""
        given = [run.env[fitted.layer.data] for run in self.given_runs]
        before, kept = fitted.error, [tensor.clone() for tensor in fitted.tensors]
        made = self.layouts[original.node.name][original.summed]
        outputs = torch.from_numpy(mask_of(made, self.masks))
        weight = held_by(self.wanted, original.weight)
        matrix = original.matrix(weight, fitted.arguments).double()[0, outputs]
        weights, extra = mixing.mixed(matrix, mixing.fitted(self.batches, read, given))
        fitted.replace(weights.unsqueeze(0), extra)
        fitted.aim(self.batches, self.given_runs, targets)
        if fitted.error >= before:
            fitted.put_back(kept)
            fitted.aim(self.batches, self.given_runs, targets)

    @staticmethod
    def read(run: Run, layer: Layer) -> Tensor | None:
        """Return what the original's layer reads; None where the run has left it behind."""
        if not run.is_past(layer.node):
            run.until(layer.node)
        data: Tensor | None = run.env.get(layer.data)
        return data

    def target(self, run: Run, end: fx.Node) -> Tensor:
        """Return what the original's node gives, of the channels that stay."""
        value: Tensor = run.until(end, inclusive=True)
        small = sliced(value, self.layouts[end.name], self.masks)
        return value.clone() if small is None else small


def _better(fitted: FittedLayer, least: float, best: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the least error so far and what the layer held then."""
    if fitted.error >= least:
        return least, best
    return fitted.error, [tensor.clone() for tensor in fitted.tensors]


def _end_of(original: Layer, site: Site) -> fx.Node:
    """Return the node of the original that stands where the site of the slim model ends."""
    its = followed(original)
    ends = its.total if site.total else its.norm if site.norm else original.node
    return ends or original.node
