"""A criterion that counts on repair: what is lost once the weights that stay have been refitted.

A layer that reads a group's channels computes `W f` from features `f`. Without the features of one
channel, and with all other weights refitted by least squares, the squared error of its output over
the data is `tr(w [inverse of sum f f']_jj^-1 w')`, w being the channel's weights and jj its block: a
Schur complement, no fit has to be tried. Channels go one by one, the one that costs least first, and
the inverse and the weights follow; a channel's score is what it cost when it went.

What an error in one layer does to the model's output is measured: with half of a group gone and what
reads it refitted, the model runs on samples that were set aside (where there is more than one batch),
and the group's scores are scaled to the error that is seen.

Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, for
whole columns of a layer; the greedy order over structures as in Kurtic et al., ZipLM, section 3.1
(arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.calibration.batches import Batch, Share
from graphprune.graph_utils.linear_layers import Layer, tensor_read_by
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Scores
from graphprune.importance.context import ScoringContext
from graphprune.importance.layer_statistics import (
    GroupReader,
    collect_group_statistics,
    map_groups_across_ranks,
)
from graphprune.utils.tensors import evaluation_mode

# Samples that are set aside to see on them what an error in a layer does, at most this share of all.
_MEASURED = 64
_SHARE = 0.25

# The least that scores are scaled by, so that their order stays where the output is as it was.
_LEAST = 1e-30


@dataclass
class ReaderElimination:
    """A place on the way to fewer channels.

    Attributes:
        place: the place.
        weights: `[outputs, features + 1]`, the last for the bias; what is eliminated becomes zero.
        inverse: of the regularised sum of f f', `[features + 1, features + 1]`.
        scale: the variance of the outputs, summed over samples.

    """

    place: GroupReader
    weights: Tensor
    inverse: Tensor
    scale: Tensor

    @classmethod
    def of(cls, reader: GroupReader) -> ReaderElimination:
        """Return a place with all of its channels."""
        squares, weights = reader.squares, F.pad(reader.matrix, (0, 1))
        # the last feature is a one: its column of squares sums the features, its square counts the samples;
        # the weight for it is 0 here, a bias changing no variance
        mean = weights @ squares[:, -1] / squares[-1, -1]
        output_squares = ((weights @ squares) * weights).sum(1)
        scale = (output_squares - squares[-1, -1] * mean.square()).sum()
        tiny = torch.finfo(scale.dtype).tiny
        return cls(reader, weights, torch.linalg.inv(reader.regular), scale.clamp_min(tiny))

    def costs(self) -> Tensor:
        """Return what each channel's going would cost now, over the variance of the outputs."""
        features = self.place.features
        # of k features a channel: `[channels, k, k]`, and weights `[channels, outputs, k]`
        blocks = self.inverse[features[:, :, None], features[:, None, :]]
        weights = self.weights[:, features].movedim(1, 0)
        solved: Tensor = torch.linalg.solve(blocks, weights.mT).mT
        return (solved * weights).sum((1, 2)) / self.scale

    def eliminate(self, channel: int) -> None:
        """Take a channel out and refit the other weights."""
        removed = self.place.features[channel]
        # the inverse becomes that of the sum without these features, and the weights the best without them:
        # `[k, k]`, `[k, features + 1]`, and `[outputs, k] @ [k, features + 1]`
        block = self.inverse[removed][:, removed]
        solved_rows = torch.linalg.solve(block, self.inverse[removed])
        self.weights -= self.weights[:, removed] @ solved_rows
        self.inverse -= self.inverse[:, removed] @ solved_rows
        self.inverse[removed, removed] = 1.0  # so that its block stays one that can be solved
        self.weights[:, removed] = 0.0


@torch.no_grad()
def reconstruction(subject: ScoringContext) -> Scores:
    """Score by the error of the model's output, after the layers that read a channel have made up for it.

    Units: squared error over the square of the output. Groups that no convolution or linear layer
    reads are scored by their share of the group's squared weights.
    """
    held_out, fitting = _set_aside(subject.data)
    statistics = collect_group_statistics(replace(subject, batches=fitting))
    scores = dict(statistics.unread)
    with evaluation_mode(statistics.graph_module):
        measure = _Measure.of(statistics.graph_module, held_out)
        for name, elimination in map_groups_across_ranks(
            statistics.places, _eliminate_channels, held_out.ranks
        ):
            scores[name] = elimination.costs * measure.unit(statistics.places[name], elimination)
    return scores


class _Way(NamedTuple):
    """The way from all channels of a group to none.

    Attributes:
        costs: what each channel cost when it went.
        halfway: what all had cost when half of them were gone.
        weights: at that time, of each place; on the CPU, for other processes to take.

    """

    costs: npt.NDArray[np.float64]
    halfway: float
    weights: list[Tensor]


def _eliminate_channels(readers: Sequence[GroupReader]) -> _Way:
    """Take out channel after channel, the cheapest first.

    A channel that costs less than one before it is scored just above that one: it goes later.
    """
    parts = [ReaderElimination.of(reader) for reader in readers]
    count = len(readers[0].features)
    scores, highest_cost, total_cost, halfway = np.zeros(count), 0.0, 0.0, 0.0
    weights: list[Tensor] = []
    remaining = np.ones(count, dtype=bool)
    for step in range(1, count + 1):
        costs = torch.stack([part.costs() for part in parts]).sum(0).cpu().numpy()
        channel = int(np.where(remaining, costs, np.inf).argmin())
        total_cost += max(float(costs[channel]), 0.0)
        highest_cost = max(float(costs[channel]), np.nextafter(highest_cost, np.inf))
        scores[channel] = highest_cost
        remaining[channel] = False
        for part in parts:
            part.eliminate(channel)
        if step == (count + 1) // 2:
            halfway, weights = total_cost, [part.weights.to("cpu", copy=True) for part in parts]
    return _Way(scores, halfway, weights)


@dataclass(frozen=True)
class _Measure:
    """A model on some samples, and its output there."""

    graph_module: fx.GraphModule
    batches: Share
    outputs: Sequence[Sequence[Tensor]]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, batches: Share) -> _Measure:
        order = list(graph_module.graph.nodes)
        runs = (Run(graph_module, b.inputs, order, what=str(b)) for b in batches)
        outputs = [_outputs(run) for run in runs]
        return cls(graph_module, batches, outputs)

    def unit(self, readers: Sequence[GroupReader], elimination: _Way) -> float:
        """Return what scores are scaled by: the error that is seen halfway over what was expected."""
        if elimination.halfway == 0 or not any(self.outputs):
            return 1.0
        return max(self.error(readers, elimination.weights) / elimination.halfway, _LEAST)

    def error(self, readers: Sequence[GroupReader], weights: Sequence[Tensor]) -> float:
        """Return the squared error of the output with such weights, over the output's square."""
        changed_layers: dict[fx.Node, tuple[Layer, Tensor]] = {}
        for reader, refitted in zip(readers, weights, strict=True):
            layer, matrix = reader.reading.layer, F.pad(reader.reading.matrix, (0, 1))
            # several readers of one layer: each changes its part of what the ones before it have changed
            new_matrix = changed_layers.get(layer.node, (layer, matrix))[1].clone()
            new_matrix[reader.number] += refitted.to(new_matrix) - F.pad(reader.matrix, (0, 1))
            changed_layers[layer.node] = layer, new_matrix
        squared_error = squared_output = 0.0
        for batch, expected_outputs in zip(self.batches, self.outputs, strict=True):
            outputs = _outputs(_Refitted(self.graph_module, batch, changed_layers))
            for output, expected in zip(outputs, expected_outputs, strict=True):
                finite = expected.isfinite() & output.isfinite()
                squared_error += float((output - expected)[finite].double().square().sum())
                squared_output += float(expected[finite].double().square().sum())
        squared_error, squared_output = map(
            float, self.batches.total((squared_error, squared_output))
        )
        return squared_error / max(squared_output, torch.finfo(torch.float64).tiny)


class _Refitted(Run):
    """A run with other weights in some layers."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batch: Batch,
        weights: Mapping[fx.Node, tuple[Layer, Tensor]],
    ) -> None:
        order = list(graph_module.graph.nodes)
        super().__init__(graph_module, batch.inputs, order, what=str(batch))
        self.weights = weights
        self.of = graph_module

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a layer whose weights are others, with a column for the bias, with those."""
        if n not in self.weights:
            return super().run_node(n)
        layer, matrix = self.weights[n]
        data, arguments = self.env[layer.data], layer.arguments(self.env)
        original_weight = tensor_read_by(self.of, layer.weight)
        bias = tensor_read_by(self.of, layer.bias) if layer.bias else 0.0
        # of `[groups, outputs, features + 1]` the last column is what refitting adds to the bias
        weight = layer.weight_like(original_weight, matrix[..., :-1].to(original_weight), arguments)
        return layer.value(
            data, weight, matrix[..., -1].flatten().to(original_weight) + bias, arguments
        )


def _set_aside(batches: Share) -> tuple[Share, Share]:
    """Return the batches to measure on and the others; a single batch serves for both."""
    numbers = sorted(batches.sizes)
    sizes = [batches.sizes[number] for number in numbers]
    enough_samples = min(_MEASURED, _SHARE * sum(sizes))
    count = next(i for i in range(1, len(sizes) + 1) if sum(sizes[:i]) >= enough_samples)
    if count == len(numbers):
        return batches, batches
    return batches.part(numbers[:count]), batches.part(numbers[count:])


def _outputs(run: Run) -> list[Tensor]:
    """Run to the end; return the tensors of numbers that come out."""
    values = pytree.tree_leaves(run.until(run.order[-1], inclusive=True))
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
