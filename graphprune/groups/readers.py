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
        # the numbers of the parameter's entries go through the views, so that every entry of the view tells
        # which one of the parameter it is
        entries = torch.arange(parameter.numel()).reshape(parameter.shape)
        for step, output_number in self.views:
            entries = _replay_view(step, entries, output_number)
        dim = self.dim % entries.dim()
        shape = [-1 if d == dim else 1 for d in range(entries.dim())]
        occurrences = []
        for slots in slots_of(self.layout, group.axis):
            slot_of_entry = torch.full((parameter.numel(),), -1)
            # `[slots]` along the dimension of the view, the same across all others
            spread = torch.from_numpy(slots).reshape(shape).expand(entries.shape)
            slot_of_entry[entries.flatten()] = spread.flatten()
            occurrences.append(slot_of_entry)
        return occurrences


def _replay_view(step: Step, viewed: Tensor, output_number: int) -> Tensor:
    """Return what a view operator of the run makes of another tensor of the same shape."""
    operands = iter([viewed])
    arguments = pytree.tree_map_only(Value, lambda _: next(operands), step.arguments)
    result: Any = step.func(**arguments)
    return result if isinstance(result, Tensor) else result[output_number]


def readers_of(graph: Dependencies) -> dict[str, list[Reader]]:
    """Return the readers of each group, by its name.

    Where an operator without parameters sums over the channels too (queries meet keys; a mean), or
    nothing reads them, all parameters that they run through are given: a channel is gone once those
    are zero.
    """
    inference = graph.inference
    by_axis, summed_otherwise = _index_by_axis(inference)
    readers_by_group: dict[str, list[Reader]] = {}
    for group in graph.groups:
        members = (m for m in group.members if m.parameter in inference.trainable)
        all_members = [Reader(m.parameter, (), m.dim, m.layout) for m in members]
        is_read = group.axis in by_axis and group.axis not in summed_otherwise
        readers_by_group[group.name] = by_axis[group.axis] if is_read else all_members
    return readers_by_group


def unread_groups(graph: Dependencies) -> set[str]:
    """Return the names of the groups that nothing reads: no output depends on their channels."""
    by_axis, summed_otherwise = _index_by_axis(graph.inference)
    return {
        g.name for g in graph.groups if g.axis not in by_axis and g.axis not in summed_otherwise
    }


def _index_by_axis(inference: Inference) -> tuple[dict[Axis, list[Reader]], set[Axis]]:
    """Return the readers of each axis, and the axes that operators without parameters sum over."""
    readers = [_readers(inference, step) for step in inference.steps]
    by_axis: dict[Axis, list[Reader]] = {}
    for reader in (reader for step_readers in readers for reader in step_readers):
        for axis in dict.fromkeys(free_axes(reader.layout)):
            by_axis.setdefault(axis, []).append(reader)
    return by_axis, set().union(*map(_find_summed_otherwise, inference.steps, readers))


def _readers(inference: Inference, step: Step) -> list[Reader]:
    """Return the parameters that an operator multiplies and sums over."""
    readers = []
    for position, dim in _find_summed_operands(step):
        value, views = step.inputs[position], []
        layout = value.layouts[dim]
        # from the operand back to the parameter, through the views between them
        while isinstance(value.source, int) and inference.steps[value.source].func.is_view:
            view = inference.steps[value.source]
            views.append((view, next(i for i, out in enumerate(view.outputs) if out is value)))
            value = view.inputs[0]
        if isinstance(value.source, str) and value.source in inference.trainable:
            readers.append(Reader(value.source, tuple(reversed(views)), dim, layout))
    return readers


def _find_summed_otherwise(step: Step, readers: Sequence[Reader]) -> set[Axis]:
    """Return the axes that an operator's result lacks, but for those its parameters are read along."""

    def collect_axes(layouts: Iterable[Layout]) -> set[Axis]:
        return {axis for layout in layouts for axis in free_axes(layout)}

    read_axes = collect_axes(layout for value in step.inputs for layout in value.layouts)
    result_axes = collect_axes(layout for value in step.outputs for layout in value.layouts)
    return read_axes - result_axes - collect_axes(reader.layout for reader in readers)


def _find_summed_operands(step: Step) -> Sequence[tuple[int, int]]:
    """Return the operands, by number, that an operator multiplies, and the dimension it sums over."""
    packet = step.func.overloadpacket
    # operands in the order of the schema: number 0 is the bias of addmm, and the data of a convolution or
    # of a recurrent layer, whose matrices are `[gates * hidden, inputs]`
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
