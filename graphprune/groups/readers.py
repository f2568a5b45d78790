"""Where channels are read: the entries of parameters that multiply a channel and sum over it.

A channel whose readers are all zero is gone for the loss, whatever makes it; and how the loss
changes with the channel's output is how it changes with a common factor of its readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.groups.groups import Dependencies, Group
from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import Axis, Layout, free_axes
from graphprune.masks import slots_of
from graphprune.rules.recurrent import GATES

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """A dimension of a parameter, or of a view of it, over which an operator sums.

    Attributes:
        parameter: the parameter's name.
        views: the steps that make the view, first to last; none where the parameter itself is read.
        dim: which dimension.
        layout: what it is made of.

    """

    parameter: str
    views: tuple[tuple[Step, int], ...]
    dim: int
    layout: Layout

    def slots(self, group: Group, parameter: Tensor) -> list[Tensor]:
        """Return, for each occurrence of the group, the slot of each entry of the parameter, or -1.

        Shapes: int64 tensors `[parameter.numel()]`.
        """
        entries = torch.arange(parameter.numel()).reshape(parameter.shape)
        for step, which in self.views:
            entries = _replayed(step, entries, which)
        dim = self.dim % entries.dim()
        shape = [-1 if d == dim else 1 for d in range(entries.dim())]
        found = []
        for slots in slots_of(self.layout, group.axis):
            of_entry = torch.full((parameter.numel(),), -1)
            spread = torch.from_numpy(slots).reshape(shape).expand(entries.shape)
            of_entry[entries.flatten()] = spread.flatten()
            found.append(of_entry)
        return found


def _replayed(step: Step, viewed: Tensor, which: int) -> Tensor:
    """Return what a view operator of the run makes of another tensor of the same shape."""
    operands = iter([viewed])
    arguments = pytree.tree_map_only(Value, lambda _: next(operands), step.arguments)
    result: Any = step.func(**arguments)
    return result if isinstance(result, Tensor) else result[which]


def readers_of(graph: Dependencies) -> dict[str, list[Reader]]:
    """Return the readers of each group, by its name.

    Where an operator without parameters sums over the channels too (queries meet keys; a mean), or
    nothing reads them, all parameters that they run through are given: a channel is gone once those
    are zero.
    """
    inference = graph.inference
    by_axis, otherwise = _by_axis(inference)
    found: dict[str, list[Reader]] = {}
    for group in graph.groups:
        members = (m for m in group.members if m.parameter in inference.trainable)
        everything = [Reader(m.parameter, (), m.dim, m.layout) for m in members]
        read = group.axis in by_axis and group.axis not in otherwise
        found[group.name] = by_axis[group.axis] if read else everything
    return found


def unread_groups(graph: Dependencies) -> set[str]:
    """Return the names of the groups that nothing reads: no output depends on their channels."""
    by_axis, otherwise = _by_axis(graph.inference)
    return {g.name for g in graph.groups if g.axis not in by_axis and g.axis not in otherwise}


def _by_axis(inference: Inference) -> tuple[dict[Axis, list[Reader]], set[Axis]]:
    """Return the readers of each axis, and the axes that operators without parameters sum over."""
    readers = [_readers(inference, step) for step in inference.steps]
    by_axis: dict[Axis, list[Reader]] = {}
    for reader in (reader for own in readers for reader in own):
        for axis in dict.fromkeys(free_axes(reader.layout)):
            by_axis.setdefault(axis, []).append(reader)
    return by_axis, set().union(*map(_summed_without_parameters, inference.steps, readers))


def _readers(inference: Inference, step: Step) -> list[Reader]:
    """Return the parameters that an operator multiplies and sums over."""
    found = []
    for position, dim in _summed(step):
        value, views = step.inputs[position], []
        layout = value.layouts[dim]
        while isinstance(value.source, int) and inference.steps[value.source].func.is_view:
            maker = inference.steps[value.source]
            views.append((maker, next(i for i, made in enumerate(maker.outputs) if made is value)))
            value = maker.inputs[0]
        if isinstance(value.source, str) and value.source in inference.trainable:
            found.append(Reader(value.source, tuple(reversed(views)), dim, layout))
    return found


def _summed_without_parameters(step: Step, readers: Sequence[Reader]) -> set[Axis]:
    """Return the axes that an operator's result lacks, but for those its parameters are read along."""

    def axes(layouts: Iterable[Layout]) -> set[Axis]:
        return {axis for layout in layouts for axis in free_axes(layout)}

    read = axes(layout for value in step.inputs for layout in value.layouts)
    made = axes(layout for value in step.outputs for layout in value.layouts)
    return read - made - axes(reader.layout for reader in readers)


def _summed(step: Step) -> Sequence[tuple[int, int]]:
    """Return the operands, by number, that an operator multiplies, and the dimension it sums over."""
    packet = step.func.overloadpacket
    if packet is aten.convolution:
        return [(1, 0 if step.arguments["transposed"] else 1)]
    if packet in (aten.mm, aten.bmm, aten._grouped_mm):
        return [(0, -1), (1, -2)]
    if packet in (aten.addmm, aten.baddbmm):
        return [(1, -1), (2, -2)]
    if packet in (aten.mv, aten.dot):
        return [(0, -1), (1, -1)]
    if packet in GATES:
        return [(n, 1) for n, value in enumerate(step.inputs) if n and len(value.layouts) == 2]
    return []
