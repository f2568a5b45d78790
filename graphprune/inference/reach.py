"""What of a model's tensors a run reads, and whether it reads it by the size of an input.

What no operator reads, and what is read only as far as an input is long, may not be cut: another
input would read the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import (
    Axis,
    Layout,
    Reason,
    axes_as_written,
    fix,
    free_axes,
    is_fixed,
    leaves,
)

aten = torch.ops.aten


def collect_read_names(steps: Sequence[Step]) -> set[str]:
    """Return the names of parameters, buffers and attributes that the operators read."""
    sources = (value.source for step in steps for value in step.inputs)
    return {source for source in sources if isinstance(source, str)}


def fix_unused(inference: Inference, read_names: set[str]) -> None:
    """Fix what no operator read: nothing is known of what it would have to fit."""
    for name, layouts in inference.parameters.items():
        if name not in read_names:
            inference.unused.append(name)
            for layout in layouts:
                fix(layout, Reason("not used in this run of the model", name))


# What gives a part of its first operand.
_TAKES_A_PART = {aten.slice, aten.select, aten.constant_pad_nd}

# What is given sizes, so that it may take a table apart by the size of an input.
_TAKES_SIZES = {
    aten.view, aten._unsafe_view, aten.split, aten.split_with_sizes, aten.expand, aten.repeat,
}  # fmt: skip


def fix_unread(inference: Inference, steps: Sequence[Step]) -> None:
    """Fix slots that no operator reads: on other inputs it may, as longer ones the rest of a table.

    A slot is read where its way ends because it is summed over or compared: the operator's operand has
    it and its results do not. A slot that is only carried along, until a slice leaves it out, is not.
    """
    read_axes: set[Axis] = set()
    for step in steps:
        if step.func.overloadpacket not in _TAKES_A_PART:
            # `[tokens, channels] @ [channels, classes]` reads
            # the channels, which its result does not have.
            read_axes |= _axes_of(step.inputs) - _axes_of(step.outputs)
    for name, layouts in inference.parameters.items():
        for axis in (axis for layout in layouts for axis in free_axes(layout)):
            if axis not in read_axes and axis.fixed is None:
                why = "not used in this run of the model"
                fix(axis, _reason_at(_find_first_taking_apart(steps, axis), why, name))


def _axes_of(values: Sequence[Value]) -> set[Axis]:
    return {axis for value in values for layout in value.layouts for axis in leaves(layout)}


def _find_first_taking_apart(steps: Sequence[Step], axis: Axis) -> Step | None:
    """Return the first operator that gives a part, or other sizes, of what has the axis."""
    partial_or_resized = _TAKES_A_PART | _TAKES_SIZES
    return next(
        (
            step
            for step in steps
            if step.func.overloadpacket in partial_or_resized and axis in _axes_of(step.inputs)
        ),
        None,
    )


def _reason_at(step: Step | None, why: str, name: str) -> Reason:
    return Reason(why, name) if step is None else replace(step.place, why=why)


def find_dims_of_parameters(inference: Inference) -> set[tuple[int, int]]:
    """Return the dimensions of the inputs that were made the same as a whole one of a parameter."""
    parameter_axes = {
        axis
        for layouts in inference.parameters.values()
        for layout in layouts
        for axis in axes_as_written(layout)
    }
    return {
        (number, dim)
        for number, layouts in enumerate(inference.inputs.values())
        for dim, axis in enumerate(layouts)
        if isinstance(axis, Axis)
        and any(
            not parameter_axes.isdisjoint(axes_as_written(tied_layout))
            for tied_layout, _ in axis.ties
        )
    }


def explain_unlike(inference: Inference, name: str, dim: int) -> Reason:
    """Return why a dimension stays that runs at other sizes of the inputs see in another way."""
    why = "what is read of it depends on the size of an input"
    axes = free_axes(inference.parameters[name][dim])
    steps = (_find_first_taking_apart(inference.steps, axis) for axis in axes)
    return _reason_at(next(filter(None, steps), None), why, name)


def reads_in_part(inference: Inference) -> bool:
    """Say whether an operator takes a dimension apart that could be cut, perhaps by an input's size."""
    if any(not is_fixed(layout) for _, layout in _find_sliced_dimensions(inference.steps)):
        return True
    resizing_steps = (
        step
        for step in _find_steps_on_tables(inference)
        if step.func.overloadpacket in _TAKES_SIZES
    )
    return any(not is_fixed(layout) for step in resizing_steps for layout in step.inputs[0].layouts)


def fix_parts_of_tables(inference: Inference) -> None:
    """Fix what is read of tables in part, for a model that takes no other sizes which would tell why."""
    for step, layout in _find_sliced_dimensions(_find_steps_on_tables(inference)):
        fix(layout, replace(step.place, why="read in part, perhaps by the size of an input"))


def _find_sliced_dimensions(steps: Iterable[Step]) -> Iterator[tuple[Step, Layout]]:
    for step in steps:
        if step.func.overloadpacket in (aten.slice, aten.select):
            layouts = step.inputs[0].layouts
            yield step, layouts[step.arguments["dim"] % len(layouts)]


def _find_steps_on_tables(inference: Inference) -> Iterator[Step]:
    """Yield the operators that no input of the model flows into."""
    # By number of the step: a value's source is a step's number, or a name.
    fed_by_inputs: list[bool] = []
    for step in inference.steps:
        sources = [value.source for value in step.inputs]
        fed_by_inputs.append(
            any(
                fed_by_inputs[source] if isinstance(source, int) else source in inference.inputs
                for source in sources
            )
        )
        if not fed_by_inputs[-1]:
            yield step
