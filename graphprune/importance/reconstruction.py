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
from graphprune.graph_utils.linear_layers import Layer, held_by
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Scores
from graphprune.importance.context import Subject
from graphprune.importance.layer_statistics import Place, shared_out, surroundings
from graphprune.utils.tensors import evaluating

# Samples that are set aside to see on them what an error in a layer does, at most this share of all.
_MEASURED = 64
_SHARE = 0.25

# The least that scores are scaled by, so that their order stays where the output is as it was.
_LEAST = 1e-30


@dataclass
class Part:
    """A place on the way to fewer channels.

    Attributes:
        place: the place.
        weights: `[outputs, features + 1]`, the last for the bias; what is eliminated becomes zero.
        inverse: of the regularised sum of f f', `[features + 1, features + 1]`.
        scale: the variance of the outputs, summed over samples.

    """

    place: Place
    weights: Tensor
    inverse: Tensor
    scale: Tensor

    @classmethod
    def of(cls, place: Place) -> Part:
        """Return a place with all of its channels."""
        squares, weights = place.squares, F.pad(place.matrix, (0, 1))
        mean = weights @ squares[:, -1] / squares[-1, -1]
        power = ((weights @ squares) * weights).sum(1)
        scale = (power - squares[-1, -1] * mean.square()).sum()
        least = torch.finfo(scale.dtype).tiny
        return cls(place, weights, torch.linalg.inv(place.regular), scale.clamp_min(least))

    def costs(self) -> Tensor:
        """Return what each channel's going would cost now, over the variance of the outputs."""
        features = self.place.features
        blocks = self.inverse[features[:, :, None], features[:, None, :]]
        weights = self.weights[:, features].movedim(1, 0)
        explained: Tensor = torch.linalg.solve(blocks, weights.mT).mT
        return (explained * weights).sum((1, 2)) / self.scale

    def eliminate(self, channel: int) -> None:
        """Take a channel out and refit the other weights."""
        gone = self.place.features[channel]
        block = self.inverse[gone][:, gone]
        others = torch.linalg.solve(block, self.inverse[gone])
        self.weights -= self.weights[:, gone] @ others
        self.inverse -= self.inverse[:, gone] @ others
        self.inverse[gone, gone] = 1.0  # so that its block stays one that can be solved
        self.weights[:, gone] = 0.0


@torch.no_grad()
def reconstruction(subject: Subject) -> Scores:
    """Score by the error of the model's output, after the layers that read a channel have made up for it.

    Units: squared error over the square of the output. Groups that no convolution or linear layer
    reads are scored by their share of the group's squared weights.
    """
    aside, rest = _set_aside(subject.data)
    found = surroundings(replace(subject, batches=rest))
    scores = dict(found.unread)
    with evaluating(found.graph_module):
        measure = _Measure.of(found.graph_module, aside)
        for name, way in shared_out(found.places, _eliminated, aside.ranks):
            scores[name] = way.costs * measure.unit(found.places[name], way)
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


def _eliminated(places: Sequence[Place]) -> _Way:
    """Take out channel after channel, the cheapest first.

    A channel that costs less than one before it is scored just above that one: it goes later.
    """
    parts = [Part.of(place) for place in places]
    count = len(places[0].features)
    scores, most, total, halfway = np.zeros(count), 0.0, 0.0, 0.0
    weights: list[Tensor] = []
    left = np.ones(count, dtype=bool)
    for step in range(1, count + 1):
        costs = torch.stack([part.costs() for part in parts]).sum(0).cpu().numpy()
        channel = int(np.where(left, costs, np.inf).argmin())
        total += max(float(costs[channel]), 0.0)
        most = max(float(costs[channel]), np.nextafter(most, np.inf))
        scores[channel] = most
        left[channel] = False
        for part in parts:
            part.eliminate(channel)
        if step == (count + 1) // 2:
            halfway, weights = total, [part.weights.to("cpu", copy=True) for part in parts]
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

    def unit(self, places: Sequence[Place], way: _Way) -> float:
        """Return what scores are scaled by: the error that is seen halfway over what was expected."""
        if way.halfway == 0 or not any(self.outputs):
            return 1.0
        return max(self.error(places, way.weights) / way.halfway, _LEAST)

    def error(self, places: Sequence[Place], weights: Sequence[Tensor]) -> float:
        """Return the squared error of the output with such weights, over the output's square."""
        changes: dict[fx.Node, tuple[Layer, Tensor]] = {}
        for place, own in zip(places, weights, strict=True):
            layer, matrix = place.reading.layer, F.pad(place.reading.matrix, (0, 1))
            changed = changes.get(layer.node, (layer, matrix))[1].clone()
            changed[place.number] += own.to(changed) - F.pad(place.matrix, (0, 1))
            changes[layer.node] = layer, changed
        missed = whole = 0.0
        for batch, wanted in zip(self.batches, self.outputs, strict=True):
            given = _outputs(_Refitted(self.graph_module, batch, changes))
            for mine, its in zip(given, wanted, strict=True):
                finite = its.isfinite() & mine.isfinite()
                missed += float((mine - its)[finite].double().square().sum())
                whole += float(its[finite].double().square().sum())
        missed, whole = map(float, self.batches.total((missed, whole)))
        return missed / max(whole, torch.finfo(torch.float64).tiny)


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
        held = held_by(self.of, layer.weight)
        bias = held_by(self.of, layer.bias) if layer.bias else 0.0
        weight = layer.weight_like(held, matrix[..., :-1].to(held), arguments)
        return layer.value(data, weight, matrix[..., -1].flatten().to(held) + bias, arguments)


def _set_aside(batches: Share) -> tuple[Share, Share]:
    """Return the batches to measure on and the others; a single batch serves for both."""
    places = sorted(batches.sizes)
    sizes = [batches.sizes[place] for place in places]
    enough = min(_MEASURED, _SHARE * sum(sizes))
    count = next(i for i in range(1, len(sizes) + 1) if sum(sizes[:i]) >= enough)
    if count == len(places):
        return batches, batches
    return batches.part(places[:count]), batches.part(places[count:])


def _outputs(run: Run) -> list[Tensor]:
    """Run to the end; return the tensors of numbers that come out."""
    values = pytree.tree_leaves(run.until(run.order[-1], inclusive=True))
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
