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
    return max((block // math.gcd(block, each) for each in channels), default=1)


Channels: TypeAlias = dict[Axis, list[int]]
"""By axis, how many channels a slot holds, for each of the dimensions that it stands in."""

# One look at all operators serves every group of a graph.
_known: WeakKeyDictionary[Dependencies, tuple[Channels, Channels]] = WeakKeyDictionary()


def _channels_a_slot(graph: Dependencies) -> tuple[Channels, Channels]:
    """Return the channels of convolutions, and the rows of products of groups."""
    if graph not in _known:
        _known[graph] = _of_dims(_convolution_dims(graph)), _of_dims(_grouped_dims(graph))
    return _known[graph]


def _of_dims(dims: Iterable[Layout]) -> Channels:
    found: Channels = {}
    for layout in dims:
        for axis in dict.fromkeys(free_axes(layout)):
            found.setdefault(axis, []).extend(_rest_of(layout, axis))
    return found


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
        return [rest for part in parts_of(layout) for rest in _rest_of(part, axis)]
    if isinstance(layout, Product) and any(leaf is axis for leaf in leaves(layout)):
        for factor in layout.factors:
            inside = _rest_of(factor, axis)
            if inside:
                return [each * size_of(layout) // size_of(factor) for each in inside]
    return []


def nearest(options: Sequence[int], wanted: float) -> int:
    """Return the option nearest to the wanted number, the larger of two that are equally near."""
    return min(options, key=lambda option: (abs(option - wanted), -option))


def competing(
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
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if total(kept_above(thresholds[middle])) <= target:
            high = middle
        else:
            low = middle + 1
    kept = kept_above(thresholds[low])
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
    best = {name: np.sort(scores[name])[::-1] for name in kept}
    changes = Changes(cost, {axes[name]: count for name, count in kept.items()})
    waiting = [(-best[n][kept[n]], n) for n in kept if kept[n] < options[n][-1]]
    heapify(waiting)
    while waiting:
        _, name = heappop(waiting)
        larger = min(o for o in options[name] if o > kept[name])
        if changes.total_with(axes[name], larger) > target:
            continue
        changes.keep(axes[name], larger)
        kept[name] = larger
        if larger < options[name][-1]:
            heappush(waiting, (-best[name][larger], name))
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
        self._otherwise: Amount = Cost(0, ()) if isinstance(cost, Cost) else cost
        if isinstance(cost, Cost):
            terms: dict[Axis, list[tuple[int, tuple[Layout, ...]]]] = {}
            for term in cost.terms:
                for axis in dict.fromkeys(a for dim in term[1] for a in free_axes(dim)):
                    terms.setdefault(axis, []).append(term)
            self._parts = {axis: Cost(0, tuple(own), cost.block) for axis, own in terms.items()}

    def total_with(self, axis: Axis, count: int) -> float:
        """Return the cost once so many slots of the axis are kept."""
        part = self._parts.get(axis, self._otherwise)
        before, now = self.kept[axis], part.total(self.kept)
        self.kept[axis] = count
        after = part.total(self.kept)
        self.kept[axis] = before
        return self.total + after - now

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
    """Return scores over what one slot of the group costs, the lowest score of all being zero.

    A slot's cost is its part of what the next smaller number of slots saves.

    Args:
        groups: the groups whose slots compete.
        scores: amounts of a loss; minus infinity for a slot that is gone.
        options: by group name, the numbers of slots that may be kept.
        cost: what is to be saved.
        kept: by group name, how many slots it has at present.

    """
    finite = [own[np.isfinite(own)] for own in (scores[g.name] for g in groups)]
    lowest = min((float(own.min()) for own in finite if own.size), default=0.0)
    changes = Changes(cost, {g.axis: kept[g.name] for g in groups})

    def each(group: Group) -> float:
        count = kept[group.name]
        fewer = max((o for o in options[group.name] if o < count), default=count - 1)
        saved = changes.total - changes.total_with(group.axis, fewer)
        return max(saved / (count - fewer), 1)

    return {g.name: (scores[g.name] - min(lowest, 0.0)) / each(g) for g in groups}


def quantiles(scores: Scores) -> Scores:
    """Return each slot's place among the scores of its group, in (0, 1], one for the highest."""
    found = {}
    for name, own in scores.items():
        order = np.argsort(-own, kind="stable")[::-1]  # of equal ones the earlier is the higher
        found[name] = np.empty(len(own))
        found[name][order] = (1 + np.arange(len(own))) / max(len(own), 1)
    return found
