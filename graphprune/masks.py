"""What stays of a dimension, given what stays of the axes that it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.layout import (
    Axis,
    Concat,
    Layout,
    Permuted,
    Product,
    leaves,
    parts_of,
    resolve,
    size_of,
)

Mask: TypeAlias = npt.NDArray[np.bool_]


def mask_of(layout: Layout, keep: Mapping[Axis, Mask]) -> Mask:
    """Return which positions of a dimension stay, given which slots of each cut axis stay."""
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return keep[layout] if layout in keep else np.ones(layout.size, dtype=bool)
    if isinstance(layout, Concat):
        parts = [mask_of(part, keep) for part in layout.parts]
        return np.concatenate(parts) if parts else np.ones(0, dtype=bool)
    if isinstance(layout, Permuted):
        return mask_of(layout.inner, keep)[list(layout.order)]
    mask = np.ones(1, dtype=bool)
    for factor in layout.factors:
        # `[1, 0]` times `[1, 1, 0]` is `[1, 1, 0, 0, 0, 0]`:
        # a position stays if it does in every factor.
        mask = np.outer(mask, mask_of(factor, keep)).reshape(-1)
    return mask


def count_kept_slots(masks: Mapping[Axis, Mask]) -> dict[Axis, int]:
    """Return how many slots of each axis stay."""
    return {axis: int(mask.sum()) for axis, mask in masks.items()}


def kept_size(layout: Layout, kept: Mapping[Axis, int]) -> int:
    """Return how many positions of a dimension stay, given how many slots of each cut axis stay."""
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return kept.get(layout, layout.size)
    if isinstance(layout, Product):
        return prod(kept_size(factor, kept) for factor in layout.factors)
    return sum(kept_size(part, kept) for part in parts_of(layout))


def touches(layout: Layout, axes: Mapping[Axis, object]) -> bool:
    """Say whether the layout contains any of the given axes."""
    return any(axis in axes for axis in leaves(layout))


def slots_of(layout: Layout, axis: Axis) -> list[npt.NDArray[np.int64]]:
    """Return, for each occurrence of an axis, the slot that each position belongs to, or -1.

    An axis that stands in several pieces of a concatenation occurs once there; one that stands
    several times in a product occurs several times.
    """
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return [np.arange(axis.size)] if layout is axis else []
    if isinstance(layout, Product):
        return list(_slots_of_product(layout, axis))
    if isinstance(layout, Permuted):
        return [slots[list(layout.order)] for slots in slots_of(layout.inner, axis)]
    # In `(a + b + a)` of two slots each, `a` occurs once, as `0 1 -1 -1 0 1`.
    slots_by_part = [slots_of(part, axis) for part in layout.parts]
    sizes = [size_of(part) for part in layout.parts]
    return [
        np.concatenate(
            [
                slots[occurrence] if occurrence < len(slots) else np.full(size, -1)
                for slots, size in zip(slots_by_part, sizes, strict=True)
            ]
        )
        for occurrence in range(max(map(len, slots_by_part), default=0))
    ]


def _slots_of_product(layout: Product, axis: Axis) -> Iterable[npt.NDArray[np.int64]]:
    sizes = [size_of(factor) for factor in layout.factors]
    for position, factor in enumerate(layout.factors):
        # In `(2 a 3)` every slot of `a` stands three times in a row, and all of that twice.
        before, after = prod(sizes[:position]), prod(sizes[position + 1 :])
        for slots in slots_of(factor, axis):
            yield np.tile(np.repeat(slots, after), before)
