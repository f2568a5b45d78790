"""A criterion that counts on repair: what is lost once the weights that stay have been refitted.

A layer that reads a group's channels computes `W f` from features `f`. Without the features of one
channel, and with all other weights refitted by least squares, the squared error of its output over
the data is `tr(w [inverse of sum f f']_jj^-1 w')`, w being the channel's weights and jj its block: a
Schur complement, no fit has to be tried. Channels go one by one, the one that costs least first, and
the inverse and the weights follow; a channel's score is what all up to it have cost.

Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, for
whole columns of a layer; the greedy order over structures as in Kurtic et al., ZipLM, section 3.1
(arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphprune.calibration import Batch, Layer, Run, held_by, layers_of
from graphprune.capture import graph_of
from graphprune.groups import DependencyGraph
from graphprune.importance.magnitude import l2
from graphprune.importance.subject import Scores, Subject
from graphprune.inference import infer
from graphprune.layout import Axis, Layout, free_axes, slots_of
from graphprune.progress import track
from graphprune.state import evaluating

# Share of the features' own squares that is added to them: channels that are the same in all samples
# leave the inverse finite.
_RIDGE = 1e-4


@dataclass
class Reading:
    """A layer that reads channels.

    Attributes:
        channels: what the dimension of its input that it sums over is made of.
        matrix: its weights, `[groups, outputs, features]`, float64.
        squares: sum over samples of f f', a last feature of one added, float64.

    """

    channels: Layout
    matrix: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Place:
    """Where a layer reads a group: one of the layer's groups, and the channels' features in it.

    Attributes:
        matrix: `[outputs, features]`.
        squares: sum over samples of f f', a last feature of one added.
        features: the features of each channel, `[channels, features a channel]`.

    """

    matrix: Tensor
    squares: Tensor
    features: Tensor


@dataclass
class Part:
    """A place on the way to fewer channels.

    Attributes:
        weights: `[outputs, features + 1]`, the last for the bias; what is eliminated becomes zero.
        inverse: of the regularised sum of f f', `[features + 1, features + 1]`.
        features: the features of each channel, `[channels, features a channel]`.
        scale: the variance of the outputs, summed over samples.

    """

    weights: Tensor
    inverse: Tensor
    features: Tensor
    scale: Tensor

    @classmethod
    def of(cls, place: Place) -> Part:
        """Return a place with all of its channels."""
        squares, own = place.squares, place.squares.diagonal()
        regular = squares + torch.diag(_RIDGE * own + 1e-9 * own.mean())
        weights = F.pad(place.matrix, (0, 1))
        mean = weights @ squares[:, -1] / squares[-1, -1]
        power = ((weights @ squares) * weights).sum(1)
        scale = (power - squares[-1, -1] * mean.square()).sum()
        least = torch.finfo(scale.dtype).tiny
        return cls(weights, torch.linalg.inv(regular), place.features, scale.clamp_min(least))

    def costs(self) -> Tensor:
        """Return what each channel's going would cost now, over the variance of the outputs."""
        blocks = self.inverse[self.features[:, :, None], self.features[:, None, :]]
        weights = self.weights[:, self.features].movedim(1, 0)
        explained: Tensor = torch.linalg.solve(blocks, weights.mT).mT
        return (explained * weights).sum((1, 2)) / self.scale

    def eliminate(self, channel: int) -> None:
        """Take a channel out and refit the other weights."""
        gone = self.features[channel]
        block = self.inverse[gone][:, gone]
        others = torch.linalg.solve(block, self.inverse[gone])
        self.weights -= self.weights[:, gone] @ others
        self.inverse -= self.inverse[:, gone] @ others
        self.inverse[gone, gone] = 1.0  # so that its block stays one that can be solved
        self.weights[:, gone] = 0.0


@torch.no_grad()
def reconstruction(subject: Subject) -> Scores:
    """Score by the error of the layers that read a channel, after least squares have made up for it.

    Units: squared error over the variance of the layer's output. Groups that no convolution or linear
    layer reads are scored by their share of the group's squared weights.
    """
    return _scored(subject, lambda places: _eliminated([Part.of(place) for place in places]))


@torch.no_grad()
def interpolative(subject: Subject) -> Scores:
    """Score by what of a channel's values cannot be put together from channels that matter more.

    The most of its own comes first, what it explains is taken from the others, and so on: a QR
    decomposition with column pivoting of the values that layers read.

    Units: share of the squares of all channels of the group. Groups that no convolution or linear
    layer reads are scored by their share of the group's squared weights.

    Source: Chee et al., Model preserving compression for neural networks, section 3 (arXiv 2108.00065).
    """
    return _scored(subject, _pivoted)


def _scored(
    subject: Subject, of_places: Callable[[Sequence[Place]], npt.NDArray[np.float64]]
) -> Scores:
    """Return what the function makes of each group's places in the layers that read it."""
    inputs, module = subject.data[0].inputs, subject.model
    graph_module = graph_of(module, inputs)
    traced = DependencyGraph(infer(graph_module, inputs))
    with evaluating(graph_module):
        readings = _readings(graph_module, traced, subject.data)
    by_weight = l2(subject)
    found: Scores = {}
    for group in track(subject.graph.groups, "scoring channels"):
        own = traced.by_name.get(group.name)
        places = [] if own is None else [p for one in readings for p in _places(one, own.axis)]
        found[group.name] = of_places(places) if places else _shares(by_weight[group.name])
    return found


def _shares(norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squares = np.square(norms)
    return squares / max(float(squares.sum()), np.finfo(float).tiny)


def _readings(
    graph_module: fx.GraphModule, graph: DependencyGraph, batches: Sequence[Batch]
) -> list[Reading]:
    """Run the model on the data and return its layers with the sums over their features."""
    layers = {layer.node: layer for layer in layers_of(graph_module).values()}
    order = list(graph_module.graph.nodes)
    runs = [Run(graph_module, batch.inputs, order) for batch in batches]
    found = []
    for node in track(order, "running the model on the data"):
        layer = layers.get(node)
        channels = _channels(graph, layer) if layer else None
        if layer is None or channels is None or not free_axes(channels):
            continue
        weight = held_by(graph_module, layer.weight)
        squares: Tensor | None = None
        for run in runs:
            run.until(node)
            data, arguments = run.env[layer.data], layer.arguments(run.env)
            for rows in layer.pieces(data, weight):
                features = layer.features(data[rows], weight, arguments)
                features = F.pad(features, (0, 1), value=1.0).double()
                more = features.mT @ features
                squares = more if squares is None else squares + more
        assert squares is not None
        found.append(Reading(channels, layer.matrix(weight, arguments).double(), squares))
    return found


def _channels(graph: DependencyGraph, layer: Layer) -> Layout | None:
    """Return the dimension of its input that a layer sums over."""
    layouts = graph.inference.nodes.get(layer.data.name)
    return layouts[layer.summed] if layouts else None


def _places(reading: Reading, axis: Axis) -> Iterator[Place]:
    """Yield the groups of a layer in which the axis is read."""
    groups, _, count = reading.matrix.shape
    for slots in slots_of(reading.channels, axis):
        window = groups * count // len(slots)
        of_feature = torch.from_numpy(slots).repeat_interleave(window).reshape(groups, count)
        for squares, matrix, its_slots in zip(
            reading.squares, reading.matrix, of_feature, strict=True
        ):
            order = torch.argsort(its_slots, stable=True)[(its_slots < 0).sum() :]
            if len(order) and len(order) % axis.size == 0:
                yield Place(matrix, squares, order.reshape(axis.size, -1))


def _eliminated(parts: Sequence[Part]) -> npt.NDArray[np.float64]:
    """Take out channel after channel, the cheapest first; return what all up to each have cost."""
    count = len(parts[0].features)
    scores, total = np.zeros(count), 0.0
    left = np.ones(count, dtype=bool)
    for _ in range(count):
        costs = torch.stack([part.costs() for part in parts]).sum(0).numpy()
        channel = int(np.where(left, costs, np.inf).argmin())
        total += max(float(costs[channel]), 0.0)
        scores[channel] = total
        left[channel] = False
        for part in parts:
            part.eliminate(channel)
    return scores


def _pivoted(places: Sequence[Place]) -> npt.NDArray[np.float64]:
    """Return what of each channel's square was left when it was the largest left."""
    count = len(places[0].features)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for place in places:
        own = torch.stack([place.squares[f][:, f] for f in place.features.unbind(1)]).sum(0)
        gram += (own / own.trace().clamp_min(torch.finfo(own.dtype).tiny)).cpu()
    scores = np.zeros(count)
    left = torch.ones(count, dtype=torch.bool)
    for _ in range(count):
        rest = torch.where(left, gram.diagonal(), -torch.inf)
        first = int(rest.argmax())
        scores[first] = max(float(rest[first]), 0.0) / len(places)
        left[first] = False
        if rest[first] > 0:
            gram = gram - torch.outer(gram[:, first], gram[first]) / gram[first, first]
    return scores
