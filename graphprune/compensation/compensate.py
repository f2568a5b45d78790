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
from graphprune.compensation.recurrent import ModelSide, find_recurrent_cells, repair_cells
from graphprune.compensation.sites import Site, site_of_layer, sites_of
from graphprune.distributed.process_group import Ranks
from graphprune.errors import InvalidRequestError, listed, warn
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies
from graphprune.inference.infer import infer
from graphprune.layout import Axis
from graphprune.masks import Mask, mask_of
from graphprune.selection.plan import Plan
from graphprune.shrink.tensors import slice_tensor
from graphprune.utils.inputs import Inputs
from graphprune.utils.progress import track
from graphprune.utils.tensors import evaluation_mode, named_tensors, working_copy

Method: TypeAlias = Literal["least_squares", "constants"]

# Fits where a ReLU follows: each aims at what is left to gain after the one before.
_ROUNDS = 4

# An error smaller than this is none: the layer and what it reads are as they were.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class LayerRepair:
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

    layers: tuple[LayerRepair, ...]
    output: tuple[float, float] | None = None

    def __str__(self) -> str:
        lines = ["error of each layer's output, as cut and repaired:"]
        lines += [
            f"  {layer.weight}: {layer.before:.3g} -> {layer.after:.3g}" for layer in self.layers
        ]
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
def compensate_model(
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
    original_graph, slim_graph = graph_of(original, inputs), graph_of(slimmer, inputs)
    graph = Dependencies(infer(original_graph, inputs))
    with evaluation_mode(slim_graph), evaluation_mode(original_graph):
        error_as_cut = _error_of_output(original_graph, slim_graph, batches)
        repair = _Repair(original_graph, slim_graph, graph, plan.masks(graph), batches)
        repaired_layers = tuple(repair.layers(method))
        errors = error_as_cut, _error_of_output(original_graph, slim_graph, batches)
    if errors[1] > max(errors[0], _ROUNDING):
        warn(
            f"the repair does more harm than good: the error of the model's output is {errors[1]:.3g} of "
            f"its square, and {errors[0]:.3g} as cut, on the same data; pass more data, batches whose "
            "numbers are of one size, or leave compensate out"
        )
    if not repaired_layers:
        warn(
            "nothing is repaired: no convolution, linear or recurrent layer of this model reads weights "
            "of its own"
        )
    # A graph that was traced holds tensors of its own; a graph that was passed is changed already.
    if slim_graph is not slimmer:
        _carry_over(slim_graph, slimmer)
    _take_values_of_rank_0(slimmer, batches.ranks)
    return Compensation(repaired_layers, errors)


def _error_of_output(original: fx.GraphModule, slim: fx.GraphModule, batches: Share) -> float:
    """Return the squared error of what a graph gives over the square of what is wanted.

    It is the mean over batches, so that one with large numbers does not hide the others.
    """
    total, copies = 0.0, [cast(fx.GraphModule, working_copy(g)) for g in (original, slim)]
    for batch in batches:
        runs = [Run(g, batch.inputs, list(g.graph.nodes), what=str(batch)) for g in copies]
        squared_error = squared_output = 0.0
        for expected, output in zip(*map(_numbers, runs), strict=True):
            # Infinite entries, of a mask that is added, say nothing; nor do outputs that were cut too.
            finite = (
                expected.isfinite() & output.isfinite() if expected.shape == output.shape else None
            )
            if finite is not None:
                squared_error += float((output - expected)[finite].double().abs().square().sum())
                squared_output += float(expected[finite].double().abs().square().sum())
        total += squared_error / squared_output if squared_output else 0.0
    return float(batches.mean(total))


def _numbers(run: Run) -> list[Tensor]:
    """Run to the end; return the tensors of real numbers that come out."""
    values = pytree.tree_leaves(run.until(run.order[-1], inclusive=True))
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _carry_over(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Give the model the values of the tensors of a graph that was traced from it."""
    values = named_tensors(graph_module)
    for name, tensor in named_tensors(model).items():
        if name in values and values[name].shape == tensor.shape:
            tensor.copy_(values[name])


def _take_values_of_rank_0(model: nn.Module, ranks: Ranks) -> None:
    """Give the model the values that it has in rank 0: machines may round in other ways."""
    if ranks.size == 1:
        return
    for tensor in named_tensors(model).values():
        if tensor.is_floating_point():
            # The sum of its values and of zeros: an all-reduce is all that there is.
            values = tensor if ranks.rank == 0 else torch.zeros_like(tensor)
            tensor.copy_(ranks.total([values])[0])


class _Repair:
    """The runs of both models, in step, and the layers that are repaired on the way."""

    def __init__(
        self,
        original: fx.GraphModule,
        slim: fx.GraphModule,
        graph: Dependencies,
        masks: dict[Axis, Mask],
        batches: Share,
    ) -> None:
        self.batches = batches
        self.wanted, self.given = original, slim
        self.layouts = graph.inference.nodes
        self.parameters = graph.inference.parameters
        self.masks = masks
        self.originals = layers_of(original)
        sites, self.order = sites_of(slim)
        self.sites = {site.layer.node: site for site in sites}
        self.wanted_cells, self.given_cells = (
            find_recurrent_cells(original),
            find_recurrent_cells(slim),
        )
        self.recurrent = {cells[0].node: name for name, cells in self.given_cells.items()}
        order = list(original.graph.nodes)
        self.wanted_runs = [Run(original, b.inputs, order, what=str(b)) for b in batches]
        self.given_runs = [Run(slim, b.inputs, self.order, what=str(b)) for b in batches]

    def layers(self, method: Method) -> Iterator[LayerRepair]:
        """Repair one layer after the other.

        Raises:
            InvalidRequestError: a layer's weights are complex.

        """
        names = [str(site.layer.weight.target) for site in self.sites.values()]
        complex_names = [name for name in names if named_tensors(self.given)[name].is_complex()]
        if complex_names:
            raise InvalidRequestError(
                f"compensate= fits real numbers, and {listed(complex_names)} hold complex ones; "
                "leave compensate out"
            )
        for node in track(self.order, "repairing layers"):
            if node in self.sites:
                site = self.sites[node]
                original = self.originals.get(str(site.layer.weight.target))
                if original is not None:
                    yield self.repair_layer(site, original, method)
            elif node in self.recurrent:
                yield from self.repair_cells(self.recurrent[node], method)

    def repair_cells(self, name: str, method: Method) -> Iterator[LayerRepair]:
        """Fit a recurrent node, found by its first weight in both models."""
        if name not in self.wanted_cells:
            return
        original_side = ModelSide(
            self.wanted, self.batches, self.wanted_runs, self.wanted_cells[name]
        )
        slim_side = ModelSide(self.given, self.batches, self.given_runs, self.given_cells[name])
        for side in (original_side, slim_side):
            for run in side.runs:
                run.until(side.cells[0].node)
        repairs = repair_cells(
            original_side,
            slim_side,
            self.parameters,
            self.masks,
            bias_alone=method == "constants",
        )
        for weight, before, after in repairs:
            yield LayerRepair(weight, before, after)

    def repair_layer(self, site: Site, original: Layer, method: Method) -> LayerRepair:
        """Fit one layer to what the original has where the site ends."""
        fitted = FittedLayer(site, self.given)
        mixing = self.mixing(original) if method == "least_squares" else None
        # Before the targets: the original has then run past the layer, and lets its input go.
        original_inputs = [self.read(run, original) for run in self.wanted_runs] if mixing else []
        end = _end_of(original, site)
        targets = [self.target(run, end) for run in self.wanted_runs]
        for run in self.given_runs:
            run.until(site.layer.node)
        fitted.aim(self.batches, self.given_runs, targets)
        error_before = least_error = fitted.error
        best_tensors = [tensor.clone() for tensor in fitted.tensors]
        if (
            mixing is not None
            and error_before > _ROUNDING
            and all(data is not None for data in original_inputs)
        ):
            self.mix(fitted, original, mixing, cast(list[Tensor], original_inputs), targets)
        # A ReLU moves which entries lack something; without one the first fit is the nearest.
        for _ in range(_ROUNDS if site.bounds != (-math.inf, math.inf) else 1):
            if fitted.error > _ROUNDING:
                least_error, best_tensors = _keep_better(fitted, least_error, best_tensors)
                fitted.fit(bias_alone=method == "constants")
                fitted.aim(self.batches, self.given_runs, targets)
        if fitted.error > least_error:
            fitted.put_back(best_tensors)
            return LayerRepair(str(site.layer.weight.target), error_before, least_error)
        return LayerRepair(str(site.layer.weight.target), error_before, fitted.error)

    def mixing(self, original: Layer) -> Mixing | None:
        """Return how the channels of the layer's input may be mixed, where that is worth a try."""
        summed = self.layouts[original.data.name][original.summed]
        return Mixing.of(original, tensor_read_by(self.wanted, original.weight), summed, self.masks)

    def mix(
        self,
        fitted: FittedLayer,
        original: Layer,
        mixing: Mixing,
        original_inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> None:
        """Start from the original's weights for mixtures of channels, where that is nearer."""
        slim_inputs = [run.env[fitted.layer.data] for run in self.given_runs]
        error_before, tensors_before = fitted.error, [tensor.clone() for tensor in fitted.tensors]
        # A layer makes channels in the dimension in which it reads them: 1 of maps, -1 of vectors.
        output_layout = self.layouts[original.node.name][original.summed]
        output_mask = torch.from_numpy(mask_of(output_layout, self.masks))
        weight = tensor_read_by(self.wanted, original.weight)
        # [kept outputs, original features], of the one group
        matrix = original.matrix(weight, fitted.arguments).double()[0, output_mask]
        weights, extra = mixing.mix_weights(
            matrix, mixing.fit_mixture(self.batches, original_inputs, slim_inputs)
        )
        fitted.replace(weights.unsqueeze(0), extra)  # [1, outputs, features] and [outputs]
        fitted.aim(self.batches, self.given_runs, targets)
        if fitted.error >= error_before:
            fitted.put_back(tensors_before)
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
        small = slice_tensor(value, self.layouts[end.name], self.masks)
        # A copy, since what runs next may write over the value.
        return value.clone() if small is None else small


def _keep_better(
    fitted: FittedLayer, least_error: float, best_tensors: list[Tensor]
) -> tuple[float, list[Tensor]]:
    """Return the least error so far and what the layer held then."""
    if fitted.error >= least_error:
        return least_error, best_tensors
    return fitted.error, [tensor.clone() for tensor in fitted.tensors]


def _end_of(original: Layer, site: Site) -> fx.Node:
    """Return the node of the original that stands where the site of the slim model ends."""
    original_site = site_of_layer(original)
    end = original_site.total if site.total else original_site.norm if site.norm else original.node
    return end or original.node
