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
from graphprune.graph_utils.linear_layers import Layer, held_by, layers_of
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import Subject
from graphprune.importance.magnitude import l2
from graphprune.importance.running import check_runs
from graphprune.inference.infer import infer
from graphprune.layout import Axis, Layout, free_axes
from graphprune.masks import slots_of
from graphprune.utils.progress import track
from graphprune.utils.tensors import evaluating

Result = TypeVar("Result")

# The least share of the features' own squares that is added to them: channels that are the same in all
# samples leave the inverse finite.
_RIDGE = 1e-4


@dataclass
class Reading:
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

    def places(self, axis: Axis) -> Iterator[Place]:
        """Yield the groups of the layer in which the axis is read."""
        groups, _, count = self.matrix.shape
        for slots in slots_of(self.channels, axis):
            window = groups * count // len(slots)
            of_feature = torch.from_numpy(slots).repeat_interleave(window).reshape(groups, count)
            for number, its_slots in enumerate(of_feature):
                order = torch.argsort(its_slots, stable=True)[(its_slots < 0).sum() :]
                if len(order) and len(order) % axis.size == 0:
                    yield Place(self, number, order.reshape(axis.size, -1))


@dataclass(frozen=True)
class Place:
    """Where a layer reads a group: one of the layer's groups, and the channels' features in it.

    Attributes:
        reading: the layer.
        number: of its group.
        features: the features of each channel, `[channels, features a channel]`.

    """

    reading: Reading
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
        own = squares.diagonal()
        scale = own.clamp_min(torch.finfo(own.dtype).tiny).rsqrt()
        correlations = squares * scale * scale.unsqueeze(1)
        count, power = len(own), float(correlations.square().sum())
        spread = (self.reading.samples + 1 - 2 / count) * (power - count)
        needed = (1 - 2 / count) * power + count**2
        share = min(needed / spread, 1.0) if spread > 0 else 1.0
        least = torch.diag(1e-9 * own.mean().expand(count))
        return torch.lerp(squares, torch.diag(own), max(share, _RIDGE)) + least


@dataclass(frozen=True)
class Surroundings:
    """A traced model with the places where its groups are read.

    Attributes:
        graph_module: the model.
        places: by group.
        unread: scores of the groups that no layer reads: each channel's share of the squared weights.

    """

    graph_module: fx.GraphModule
    places: dict[str, list[Place]]
    unread: Scores


def surroundings(subject: Subject) -> Surroundings:
    """Trace a model, run it on the data, and return where each of its groups is read."""
    check_runs(subject)
    inputs, module = subject.data[0].inputs, subject.model
    graph_module = graph_of(module, inputs)
    traced = Dependencies(infer(graph_module, inputs))
    with evaluating(graph_module):
        readings = _readings(graph_module, traced, subject.data)
    by_weight = l2(subject)
    places, unread = {}, {}
    for group in subject.graph.groups:
        own = traced.by_name.get(group.name)
        found = [] if own is None else [p for one in readings for p in one.places(own.axis)]
        if found:
            places[group.name] = found
        else:
            squares = np.square(by_weight[group.name])
            unread[group.name] = squares / max(float(squares.sum()), np.finfo(float).tiny)
    return Surroundings(graph_module, places, unread)


def shared_out(
    places: Mapping[str, list[Place]], function: Callable[[list[Place]], Result], ranks: Ranks
) -> Iterator[tuple[str, Result]]:
    """Yield what a function makes of each group's places, every process doing its share of the groups."""
    names = list(places)
    rounds = [names[start : start + ranks.size] for start in range(0, len(names), ranks.size)]
    for each in track(rounds, "scoring channels"):
        own = each[ranks.rank] if ranks.rank < len(each) else None
        results = ranks.gathered(None if own is None else function(places[own]))
        yield from zip(each, results, strict=False)


def _readings(graph_module: fx.GraphModule, graph: Dependencies, batches: Share) -> list[Reading]:
    """Run the model on the data and return its layers with the sums over their features."""
    layers = {layer.node: layer for layer in layers_of(graph_module).values()}
    order = list(graph_module.graph.nodes)
    runs = [Run(graph_module, b.inputs, order, what=str(b)) for b in batches]
    found = []
    for node in track(order, "running the model on the data"):
        layer = layers.get(node)
        channels = _channels(graph, layer) if layer else None
        if layer is None or channels is None or not free_axes(channels):
            continue
        weight = held_by(graph_module, layer.weight)
        matrix = layer.matrix(weight, {"groups": layer.groups}).double()
        squares, samples = torch.zeros((), dtype=torch.float64), 0
        for batch, run in zip(batches, runs, strict=True):
            run.until(node)
            refuse_unless_finite(batch, run.env[layer.data], f"where {layer.weight.target} is read")
            data, arguments = run.env[layer.data], layer.arguments(run.env)
            for rows in layer.pieces(data, weight):
                features = layer.features(data[rows], weight, arguments)
                features = F.pad(features, (0, 1), value=1.0).double()
                squares = squares + features.mT @ features
                samples += features.shape[1]
        squares, count = batches.total((squares, samples))
        found.append(Reading(layer, channels, matrix, squares, int(count)))
    return found


def _channels(graph: Dependencies, layer: Layer) -> Layout | None:
    """Return the dimension of its input that a layer sums over."""
    layouts = graph.inference.nodes.get(layer.data.name)
    return layouts[layer.summed] if layouts else None
