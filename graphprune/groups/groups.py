"""Groups of channels that go together, and the dimensions in which nothing can go, from the layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.inference.recorded import Inference
from graphprune.layout import (
    Axis,
    Concat,
    Layout,
    Permuted,
    Product,
    Reason,
    free_axes,
    parts_of,
    resolve,
    size_of,
    why_fixed,
)

Scores: TypeAlias = dict[str, npt.NDArray[np.float64]]
"""By group name, one score a slot: the higher, the more it matters."""


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer that loses slots when its group does."""

    parameter: str
    dim: int
    layout: Layout


@dataclass(frozen=True)
class Group:
    """Channels that can be removed, one by one, from everything that they run through.

    Attributes:
        name: the first member, as `parameter:dim`, and which factor of it where it has several.
        axis: the axis of the layouts that this group is.
        members: every parameter and buffer dimension that the channels run through.
        inner: whether the channels lie inside larger units that are cut by default instead (the
            features of a head, the channels of a convolution group).
        renormalised: operators that take a statistic over the channels, so that a cut is inexact.

    """

    name: str
    axis: Axis
    members: tuple[Member, ...]
    inner: bool

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.axis.size

    @property
    def renormalised(self) -> tuple[Reason, ...]:
        """Operators that take a statistic over the channels."""
        return self.axis.renormalised

    @property
    def exact(self) -> bool:
        """Whether the model without some channels equals the model with them silenced."""
        return not self.renormalised

    def __str__(self) -> str:
        kind = "exact" if self.exact else "renormalised"
        names = ", ".join(f"{member.parameter}:{member.dim}" for member in self.members[:6])
        more = f" and {len(self.members) - 6} more" if len(self.members) > 6 else ""
        return f"{self.name}  {self.size} channels, {kind}{', inner' if self.inner else ''}: {names}{more}"


@dataclass(frozen=True)
class Fixed:
    """A dimension of a parameter that keeps all of its slots, and why."""

    parameter: str
    dim: int
    size: int
    reason: Reason

    def __str__(self) -> str:
        return f"{self.parameter}:{self.dim}  {self.size} fixed: {self.reason}"


class Dependencies:
    """Which channels of a model go together, and which stay and why: what analyses and choices read.

    Attributes:
        inference: the layouts that everything here is read from.
        groups: what can be cut, in the order of the model's parameters.
        fixed: parameter dimensions in which nothing can be cut.

    """

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.groups = _groups(inference)
        self.fixed = list(_find_fixed(inference))

    @cached_property
    def by_axis(self) -> dict[Axis, Group]:
        """The group of each axis."""
        return {group.axis: group for group in self.groups}

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The group of each name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def names(self) -> dict[Axis, str]:
        """The name of the group of each axis."""
        return {axis: group.name for axis, group in self.by_axis.items()}

    @property
    def unknown(self) -> list[Reason]:
        """Operators that have no rule, so that everything they touch is fixed."""
        return self.inference.unknown

    def __str__(self) -> str:
        lines = [f"groups that can be cut: {len(self.groups)}"]
        lines += [f"  {group}" for group in self.groups]
        lines += [f"parameter dimensions that are fixed: {len(self.fixed)}"]
        lines += [f"  {fixed}" for fixed in self.fixed]
        if self.unknown:
            lines.append(f"operators without a rule, whose channels stay: {len(self.unknown)}")
            lines += [
                f"  {reason.operator}  {reason.module}  {reason.source}" for reason in self.unknown
            ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.groups)} groups, {len(self.fixed)} fixed dimensions>"


def _groups(inference: Inference) -> list[Group]:
    members: dict[Axis, list[Member]] = {}
    names: dict[Axis, str] = {}
    inner: set[Axis] = set()
    # parameters before buffers, for a group is called after its first member
    for parameter in sorted(inference.parameters, key=lambda p: p not in inference.trainable):
        for dim, layout in enumerate(inference.parameters[parameter]):
            axes = free_axes(layout)
            inner.update(_inner_axes(layout, inner))
            for number, axis in enumerate(axes):
                members.setdefault(axis, []).append(Member(parameter, dim, resolve(layout)))
                suffix = f".{number}" if len(axes) > 1 else ""
                names.setdefault(axis, f"{parameter}:{dim}{suffix}")
    return [
        Group(names[axis], axis, tuple(group_members), axis in inner)
        for axis, group_members in members.items()
    ]


def _inner_axes(layout: Layout, known_inner: set[Axis]) -> Iterator[Axis]:
    """Yield the free axes that stand to the right of a free axis in a product.

    Axes known to be inner elsewhere do not count as outer ones, so that of two axes that stand in
    both orders in different places, the one seen first as the outer one is cut.
    """
    layout = resolve(layout)
    if isinstance(layout, Concat | Permuted):
        for part in parts_of(layout):
            yield from _inner_axes(part, known_inner)
    elif isinstance(layout, Product):
        has_outer = False
        for factor in layout.factors:
            # of `(heads dim)` dim is inner: heads are cut as wholes
            if has_outer:
                yield from free_axes(factor)
            else:
                yield from _inner_axes(factor, known_inner)
                has_outer = any(axis not in known_inner for axis in free_axes(factor))


def _find_fixed(inference: Inference) -> Iterator[Fixed]:
    for parameter, layouts in inference.parameters.items():
        for dim, layout in enumerate(layouts):
            reason = why_fixed(layout)
            if reason is not None and not free_axes(layout):
                yield Fixed(parameter, dim, size_of(layout), reason)
