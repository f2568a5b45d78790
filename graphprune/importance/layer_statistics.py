"""The layers that read a group's channels, with what the data says of what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphprune.calibration.batches import Share, refuse_unless_finite
from graphprune.capture.capture import graph_of
from graphprune.distributed.process_group import Ranks
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import ScoringContext
from graphprune.importance.magnitude import l2
from graphprune.importance.running import check_runs
from graphprune.inference.infer import infer
from graphprune.layout import Axis, Layout, free_axes
from graphprune.masks import slots_of
from graphprune.utils.progress import track
from graphprune.utils.tensors import evaluation_mode

Result = TypeVar("Result")

# The least share of the features' own squares that is added to them: channels that are the same in all
# samples leave the inverse finite.
_RIDGE = 1e-4


@dataclass
class LayerStatistics:
    """A layer that reads channels.

    Attributes:
        layer: the layer.
        channels: what the dimension of its input that it sums over is made of.
        matrix: its weights, `[groups, outputs, features]`, float64.
        squares: sum over samples of f f', a last feature of one added, float64.
        samples: how many there were.

    """

    layer: Layer
    channels: Layout
    matrix: Tensor
    squares: Tensor
    samples: int

    def places(self, axis: Axis) -> Iterator[GroupReader]:
        """Yield the groups of the layer in which the axis is read."""
        groups, _, count = self.matrix.shape
        for slots in slots_of(self.channels, axis):
            per_position = groups * count // len(slots)
            # the features of a position, the entries of its window, lie side by side: `[positions]` ->
            # `[groups, features]`
            slot_of_feature = (
                torch.from_numpy(slots).repeat_interleave(per_position).reshape(groups, count)
            )
            for number, group_slots in enumerate(slot_of_feature):
                # sorted by slot, without those of slot -1, which come first: of slots -1 1 0 1 0 the order
                # is 2 4 1 3, channel 0 having the features 2 and 4
                order = torch.argsort(group_slots, stable=True)[(group_slots < 0).sum() :]
                counts = torch.bincount(group_slots[group_slots >= 0], minlength=axis.size)
                if counts.min() == counts.max() > 0:
                    yield GroupReader(self, number, order.reshape(axis.size, -1))


@dataclass(frozen=True)
class GroupReader:
    """Where a layer reads a group: one of the layer's groups, and the channels' features in it.

    Attributes:
        reading: the layer.
        number: of its group.
        features: the features of each channel, `[channels, features a channel]`.

    """

    reading: LayerStatistics
    number: int
    features: Tensor

    @property
    def matrix(self) -> Tensor:
        """The weights, `[outputs, features]`."""
        return self.reading.matrix[self.number]

    @property
    def squares(self) -> Tensor:
        """Sum over samples of f f', `[features + 1, features + 1]`."""
        return self.reading.squares[self.number]

    @property
    def regular(self) -> Tensor:
        """The squares, products of different features made smaller where few samples vouch for them.

        The share is that of oracle approximating shrinkage, for features scaled to the same square.

        Source: Chen et al., Shrinkage algorithms for MMSE covariance estimation, eq. 23
        (arXiv 0907.4698).
        """
        squares = self.squares
        diagonal = squares.diagonal()
        scale = diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).rsqrt()
        correlations = squares * scale * scale.unsqueeze(1)
        count, power = len(diagonal), float(correlations.square().sum())
        # with a diagonal of ones tr(S) is the count and tr(S S) the power
        denominator = (self.reading.samples + 1 - 2 / count) * (power - count)
        numerator = (1 - 2 / count) * power + count**2
        shrinkage = min(numerator / denominator, 1.0) if denominator > 0 else 1.0
        # a feature that is zero in all samples would leave no inverse
        jitter = torch.diag(1e-9 * diagonal.mean().expand(count))
        return torch.lerp(squares, torch.diag(diagonal), max(shrinkage, _RIDGE)) + jitter


@dataclass(frozen=True)
class GroupStatistics:
    """A traced model with the places where its groups are read.

    Attributes:
        graph_module: the model.
        places: by group.
        unread: scores of the groups that no layer reads: each channel's share of the squared weights.

    """

    graph_module: fx.GraphModule
    places: dict[str, list[GroupReader]]
    unread: Scores


def collect_group_statistics(subject: ScoringContext) -> GroupStatistics:
    """Trace a model, run it on the data, and return where each of its groups is read."""
    check_runs(subject)
    inputs, module = subject.data[0].inputs, subject.model
    graph_module = graph_of(module, inputs)
    traced = Dependencies(infer(graph_module, inputs))
    with evaluation_mode(graph_module):
        readings = _readings(graph_module, traced, subject.data)
    weight_norms = l2(subject)
    places, unread = {}, {}
    for group in subject.graph.groups:
        traced_group = traced.by_name.get(group.name)
        readers = (
            []
            if traced_group is None
            else [reader for reading in readings for reader in reading.places(traced_group.axis)]
        )
        if readers:
            places[group.name] = readers
        else:
            squares = np.square(weight_norms[group.name])
            unread[group.name] = squares / max(float(squares.sum()), np.finfo(float).tiny)
    return GroupStatistics(graph_module, places, unread)


def map_groups_across_ranks(
    places: Mapping[str, list[GroupReader]],
    function: Callable[[list[GroupReader]], Result],
    ranks: Ranks,
) -> Iterator[tuple[str, Result]]:
    """Yield what a function makes of each group's places, every process doing its share of the groups."""
    names = list(places)
    rounds = [names[start : start + ranks.size] for start in range(0, len(names), ranks.size)]
    for round_names in track(rounds, "scoring channels"):
        local_name = round_names[ranks.rank] if ranks.rank < len(round_names) else None
        # it waits for all: a process without a group in the last round comes with nothing
        results = ranks.gather(None if local_name is None else function(places[local_name]))
        yield from zip(round_names, results, strict=False)


def _readings(
    graph_module: fx.GraphModule, graph: Dependencies, batches: Share
) -> list[LayerStatistics]:
    """Run the model on the data and return its layers with the sums over their features."""
    layers = {layer.node: layer for layer in layers_of(graph_module).values()}
    order = list(graph_module.graph.nodes)
    runs = [Run(graph_module, b.inputs, order, what=str(b)) for b in batches]
    readings = []
    for node in track(order, "running the model on the data"):
        layer = layers.get(node)
        channels = _channels(graph, layer) if layer else None
        if layer is None or channels is None or not free_axes(channels):
            continue
        weight = tensor_read_by(graph_module, layer.weight)
        matrix = layer.matrix(weight, {"groups": layer.groups}).double()
        squares, samples = torch.zeros((), dtype=torch.float64), 0
        for batch, run in zip(batches, runs, strict=True):
            # all batches stop before this layer, as long as its input is still there
            run.until(node)
            refuse_unless_finite(batch, run.env[layer.data], f"where {layer.weight.target} is read")
            data, arguments = run.env[layer.data], layer.arguments(run.env)
            for rows in layer.pieces(data, weight):
                features = layer.features(data[rows], weight, arguments)
                # `[groups, samples, features + 1]`; the one stands for the bias and counts samples
                features = F.pad(features, (0, 1), value=1.0).double()
                squares = squares + features.mT @ features
                samples += features.shape[1]
        squares, count = batches.total((squares, samples))
        readings.append(LayerStatistics(layer, channels, matrix, squares, int(count)))
    return readings


def _channels(graph: Dependencies, layer: Layer) -> Layout | None:
    """Return the dimension of its input that a layer sums over."""
    layouts = graph.inference.nodes.get(layer.data.name)
    return layouts[layer.summed] if layouts else None
