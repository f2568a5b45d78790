"""How many channels each group keeps: the numbers that are allowed, and those that meet a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch

from graphprune.groups.cost import Amount, Cost
from graphprune.groups.groups import Dependencies, Group, Scores
from graphprune.layout import (
    Axis,
    Concat,
    Layout,
    Permuted,
    Product,
    free_axes,
    leaves,
    parts_of,
    resolve,
    size_of,
)

Align: TypeAlias = int | Literal["auto"]

# From a group of so many slots on, the channels of convolutions of which a multiple is kept. ONNX Runtime's
# kernels take them in blocks of 16 (AVX-512) or 8 (AVX2), and take none unless they are a multiple of 4;
# narrow groups get a finer choice for it. The same on every machine, for a plan belongs to none.
CONVOLUTION_MULTIPLES = ((64, 16), (16, 8), (0, 4))

# Torch's product of groups of rows takes matrices whose rows are multiples of 16 bytes, no others.
GROUPED_MULTIPLE = 8


def allowed_sizes(graph: Dependencies, group: Group, align: Align) -> list[int]:
    """Return the numbers of slots that may be kept: multiples of the alignment, and all of them."""
    if align == "auto":
        block = next(number for size, number in CONVOLUTION_MULTIPLES if group.size >= size)
    else:
        block = align
    of_convolutions, of_groups = _channels_a_slot(graph)
    block = _slots_for(block, of_convolutions.get(group.axis, ()))
    block = math.lcm(block, _slots_for(GROUPED_MULTIPLE, of_groups.get(group.axis, ())))
    return [*range(block, group.size, block), group.size]


def _slots_for(block: int, channels: Iterable[int]) -> int:
    """Return how many slots make a multiple of the block, where a slot holds that many channels."""
    # multiples of 16 channels: 4 slots of 4 channels, 8 of 6
    return math.lcm(*(block // math.gcd(block, channel_count) for channel_count in channels))


Channels: TypeAlias = dict[Axis, list[int]]
"""By axis, how many channels a slot holds, for each of the dimensions that it stands in."""

# One look at all operators serves every group of a graph.
_channels_by_graph: WeakKeyDictionary[Dependencies, tuple[Channels, Channels]] = WeakKeyDictionary()


def _channels_a_slot(graph: Dependencies) -> tuple[Channels, Channels]:
    """Return the channels of convolutions, and the rows of products of groups."""
    if graph not in _channels_by_graph:
        _channels_by_graph[graph] = (
            _collect_channels(_convolution_dims(graph)),
            _collect_channels(_grouped_dims(graph)),
        )
    return _channels_by_graph[graph]


def _collect_channels(dims: Iterable[Layout]) -> Channels:
    channels: Channels = {}
    for layout in dims:
        for axis in dict.fromkeys(free_axes(layout)):
            channels.setdefault(axis, []).extend(_rest_of(layout, axis))
    return channels


def _convolution_dims(graph: Dependencies) -> list[Layout]:
    return [
        layout
        for step in graph.inference.steps
        if step.func.overloadpacket is torch.ops.aten.convolution
        for layout in (step.inputs[0].layouts[1], step.outputs[0].layouts[1])
    ]


def _grouped_dims(graph: Dependencies) -> list[Layout]:
    return [
        layout
        for step in graph.inference.steps
        if step.func.overloadpacket is torch.ops.aten._grouped_mm
        for value in step.inputs[:2]
        for layout in value.layouts[-2:]
    ]


def _rest_of(layout: Layout, axis: Axis) -> list[int]:
    layout = resolve(layout)
    if layout is axis:
        return [1]
    if isinstance(layout, Concat | Permuted):
        return [
            channel_count for part in parts_of(layout) for channel_count in _rest_of(part, axis)
        ]
    if isinstance(layout, Product) and any(leaf is axis for leaf in leaves(layout)):
        for factor in layout.factors:
            inner_counts = _rest_of(factor, axis)
            if inner_counts:
                # a slot of heads in `(heads:3 dim:4)` holds 12 // 3 = 4 channels
                return [
                    inner_count * size_of(layout) // size_of(factor) for inner_count in inner_counts
                ]
    return []


def nearest(options: Sequence[int], target: float) -> int:
    """Return the option nearest to the target, the larger of two that are equally near."""
    return min(options, key=lambda option: (abs(option - target), -option))


def allocate_by_score(
    groups: Sequence[Group],
    scores: Scores,
    options: Mapping[str, Sequence[int]],
    cost: Amount,
    target: float,
) -> dict[str, int]:
    """Return how many slots each group keeps when all slots compete by score.

    The lowest go until the cost is no more than the target; where rounding to the numbers allowed
    removed too many, the best of them come back. Where no number meets the target, those that cost nothing
    do.
    """
    # minus infinity keeps all slots but those that are gone, whose score that is
    thresholds = np.unique(np.concatenate([[-np.inf], *(scores[g.name] for g in groups)]))

    def kept_above(threshold: float) -> dict[str, int]:
        return {
            g.name: nearest(options[g.name], float(np.count_nonzero(scores[g.name] > threshold)))
            for g in groups
        }

    def total(kept: Mapping[str, int]) -> float:
        return cost.total({g.axis: kept[g.name] for g in groups})

    if total({g.name: g.size for g in groups}) <= target:
        return {g.name: g.size for g in groups}
    # bisection: the higher the threshold, the fewer slots stay, and the less they cost
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if total(kept_above(thresholds[middle])) <= target:
            high = middle
        else:
            low = middle + 1
    kept = kept_above(thresholds[low])
    # where the target is out of reach, what was reached takes its place
    return _give_back(groups, kept, options, scores, cost, max(target, total(kept)))


def _give_back(
    groups: Sequence[Group],
    kept: dict[str, int],
    options: Mapping[str, Sequence[int]],
    scores: Scores,
    cost: Amount,
    target: float,
) -> dict[str, int]:
    """Return the slots kept, with the best-scored others that still fit under the target."""
    axes = {group.name: group.axis for group in groups}
    descending_scores = {name: np.sort(scores[name])[::-1] for name in kept}
    changes = Changes(cost, {axes[name]: count for name, count in kept.items()})
    # by the score of the best slot that is gone, negated, since a heap gives the smallest first
    candidates = [(-descending_scores[n][kept[n]], n) for n in kept if kept[n] < options[n][-1]]
    heapify(candidates)
    while candidates:
        _, name = heappop(candidates)
        larger = min(o for o in options[name] if o > kept[name])
        # not put back into the heap: what does not fit now will not fit later, when more is kept
        if changes.total_with(axes[name], larger) > target:
            continue
        changes.keep(axes[name], larger)
        kept[name] = larger
        if larger < options[name][-1]:
            heappush(candidates, (-descending_scores[name][larger], name))
    return kept


class Changes:
    """A cost while one axis after the other comes to keep another number of slots.

    A look at one axis computes anew only the terms of a `Cost` in which it stands.

    Attributes:
        kept: how many slots of each axis are kept now.
        total: the cost now.

    """

    def __init__(self, cost: Amount, kept: dict[Axis, int]) -> None:
        self.kept = kept
        self.total = cost.total(kept)
        self._parts: dict[Axis, Cost] = {}
        # an axis in no term of a `Cost` costs nothing; other amounts have no terms, and are asked whole
        self._otherwise: Amount = Cost(0, ()) if isinstance(cost, Cost) else cost
        if isinstance(cost, Cost):
            terms: dict[Axis, list[tuple[int, tuple[Layout, ...]]]] = {}
            for term in cost.terms:
                for axis in dict.fromkeys(a for dim in term[1] for a in free_axes(dim)):
                    terms.setdefault(axis, []).append(term)
            self._parts = {
                axis: Cost(0, tuple(axis_terms), cost.block) for axis, axis_terms in terms.items()
            }

    def total_with(self, axis: Axis, count: int) -> float:
        """Return the cost once so many slots of the axis are kept."""
        part = self._parts.get(axis, self._otherwise)
        old_count, cost_before = self.kept[axis], part.total(self.kept)
        # put in and taken out again, which is cheaper than a copy for each look
        self.kept[axis] = count
        cost_after = part.total(self.kept)
        self.kept[axis] = old_count
        return self.total + cost_after - cost_before

    def keep(self, axis: Axis, count: int) -> None:
        """Keep so many slots of the axis."""
        self.total = self.total_with(axis, count)
        self.kept[axis] = count


def per_cost(
    groups: Sequence[Group],
    scores: Scores,
    options: Mapping[str, Sequence[int]],
    cost: Amount,
    kept: Mapping[str, int],
) -> Scores:
    """Return scores over what one slot of the group costs, all shifted up if some are below zero.

    A slot's cost is its part of what the next smaller number of slots saves.

    Args:
        groups: the groups whose slots compete.
        scores: amounts of a loss; minus infinity for a slot that is gone.
        options: by group name, the numbers of slots that may be kept.
        cost: what is to be saved.
        kept: by group name, how many slots it has at present.

    """
    finite = [
        group_scores[np.isfinite(group_scores)] for group_scores in (scores[g.name] for g in groups)
    ]
    lowest = min(
        (float(finite_scores.min()) for finite_scores in finite if finite_scores.size), default=0.0
    )
    changes = Changes(cost, {g.axis: kept[g.name] for g in groups})

    def cost_of_slot(group: Group) -> float:
        count = kept[group.name]
        fewer = max((o for o in options[group.name] if o < count), default=count - 1)
        saved = changes.total - changes.total_with(group.axis, fewer)
        # one at least, so that what costs nothing divides by something
        return max(saved / (count - fewer), 1)

    # shifted up, since a negative score over a larger cost would come out higher than over a smaller one
    return {g.name: (scores[g.name] - min(lowest, 0.0)) / cost_of_slot(g) for g in groups}


def quantiles(scores: Scores) -> Scores:
    """Return each slot's place among the scores of its group, in (0, 1], one for the highest."""
    ranks = {}
    for name, group_scores in scores.items():
        order = np.argsort(-group_scores, kind="stable")[
            ::-1
        ]  # of equal ones the earlier is the higher
        ranks[name] = np.empty(len(group_scores))
        ranks[name][order] = (1 + np.arange(len(group_scores))) / max(len(group_scores), 1)
    return ranks
