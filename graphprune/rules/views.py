"""Operators that rearrange elements: reshape, permute, slice, concatenate, pad, and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from graphprune.layout import (
    EMPTY,
    UNIT,
    Axis,
    Concat,
    Layout,
    Permuted,
    Product,
    Reason,
    can_split,
    cut,
    is_fixed,
    size_of,
    split,
)
from graphprune.rules.pattern import pattern
from graphprune.rules.registry import Call, Layouts, rule
from graphprune.rules.reshape import regroup

aten = torch.ops.aten


@rule(aten.view, aten._unsafe_view)
def view(call: Call) -> Sequence[Layouts]:
    """Regroup the row-major product of the dimensions."""
    reason = call.why("a reshape that cuts across channels")
    layouts, shape = call.layouts("self"), list(call.outputs[0].shape)
    if prod(map(size_of, layouts)) != prod(shape):  # bytes read as numbers of another width
        for layout in layouts:
            call.fix(layout, reason.why)
        return [[call.fixed(size, reason.why) for size in shape]]
    return [regroup(layouts, shape, reason)]


@rule(aten.permute)
def permute(call: Call) -> Sequence[Layouts]:
    """Reorder the dimensions."""
    layouts = call.layouts("self")
    return [[layouts[dim] for dim in call["dims"]]]


@rule(aten.transpose, aten.t)
def transpose(call: Call) -> Sequence[Layouts]:
    """Exchange two dimensions; `t` exchanges the only two there are."""
    layouts = list(call.layouts("self"))
    if "dim0" not in call.arguments:
        return [layouts[::-1]]
    dim0, dim1 = call.dim("dim0"), call.dim("dim1")
    if layouts:
        layouts[dim0], layouts[dim1] = layouts[dim1], layouts[dim0]
    return [layouts]


@rule(aten.expand)
def expand(call: Call) -> Sequence[Layouts]:
    """Repeat dimensions of size 1, each along a fresh axis that no parameter has."""
    shape = list(call.outputs[0].shape)
    layouts = call.layouts("self")
    added_count = len(shape) - len(layouts)
    padded: Layouts = [UNIT] * added_count + layouts
    return [
        [
            Axis(size) if size_of(layout) == 1 else layout
            for layout, size in zip(padded, shape, strict=True)
        ]
    ]


@rule(aten.squeeze)
def squeeze(call: Call) -> Sequence[Layouts]:
    """Drop dimensions of size 1."""
    layouts = call.layouts("self")
    dims = call.arguments.get("dim", range(len(layouts)))
    dims = [dims] if isinstance(dims, int) else dims
    named = {dim % max(len(layouts), 1) for dim in dims}
    kept = [layout for i, layout in enumerate(layouts) if i not in named or size_of(layout) != 1]
    return [kept]


@rule(aten.unsqueeze)
def unsqueeze(call: Call) -> Sequence[Layouts]:
    """Insert a dimension of size 1."""
    layouts = list(call.layouts("self"))
    layouts.insert(call["dim"] % (len(layouts) + 1), UNIT)
    return [layouts]


@rule(aten.slice)
def slice_(call: Call) -> Sequence[Layouts]:
    """Cut the dimension at the start and the end; a step takes one slot out of every few."""
    layouts = list(call.layouts("self"))
    dim = call.dim()
    size = size_of(layouts[dim])
    start, end, step = slice(call["start"], call["end"], call["step"]).indices(size)
    end = max(start, end)
    if step == 1:
        layouts[dim] = cut(layouts[dim], [start, end], call.why("a slice"))[1]
    # `x[1::2]` of six slots: `(3 2)`, of which the
    # inner two stay and the outer three are the result.
    elif start < step and end == size and can_split(layouts[dim], step):
        outer, inner = split(layouts[dim], step, call.why("a strided slice"))
        call.fix(inner, "a strided slice")
        layouts[dim] = outer
    else:
        call.fix(layouts[dim], "a strided slice")
        layouts[dim] = call.fixed(call.outputs[0].shape[dim], "a strided slice")
    return [layouts]


@rule(aten.select)
def select(call: Call) -> Sequence[Layouts]:
    """Take one slot, which then stays."""
    layouts = list(call.layouts("self"))
    layout = layouts.pop(call.dim())
    index = call["index"] % size_of(layout)
    # Cut before and behind it: an axis of one slot is never pruned, the others may be.
    cut(layout, [index, index + 1], call.why("a slot is selected"))
    return [layouts]


@rule(aten.unbind)
def unbind(call: Call) -> Sequence[Layouts]:
    """Take every slot apart from the others."""
    layouts = list(call.layouts("self"))
    call.fix(layouts.pop(call.dim()), "taken apart slot by slot")
    return [layouts] * len(call.outputs)


@rule(
    aten.split,
    aten.split_with_sizes,
    aten.unsafe_split,
    aten.unsafe_split_with_sizes,
)
def split_(call: Call) -> Sequence[Layouts]:
    """Cut the dimension into consecutive pieces."""
    layouts, dim = call.layouts("self"), call.dim()
    ends, end = [], 0
    for output in call.outputs:
        end += output.shape[dim]
        ends.append(end)
    pieces = cut(layouts[dim], ends[:-1], call.why("a split"))
    return [[*layouts[:dim], piece, *layouts[dim + 1 :]] for piece in pieces]


@rule(aten.cat)
def cat(call: Call) -> Sequence[Layouts]:
    """Lay the dimension end to end; all others are the same."""
    # `torch.cat` takes an empty tensor of shape `[0]` beside tensors of any rank.
    operands = [call.layouts_of(t) for t in call["tensors"] if tuple(t.shape) != (0,)]
    if not operands:
        return [[call.fixed(0, "a tensor without elements")]]
    dim = call["dim"] % max(len(operands[0]), 1)
    result_layouts = list(operands[0])
    for other in operands[1:]:
        for i, layout in enumerate(other):
            if i != dim:
                call.unify(result_layouts[i], layout)
    result_layouts[dim] = Concat(tuple(layouts[dim] for layouts in operands))
    return [result_layouts]


@rule(aten.stack)
def stack(call: Call) -> Sequence[Layouts]:
    """Lay tensors along a new dimension, whose slots stay; all others are the same."""
    operands = [list(call.layouts_of(t)) for t in call["tensors"]]
    for other in operands[1:]:
        for first_layout, other_layout in zip(operands[0], other, strict=True):
            call.unify(first_layout, other_layout)
    dim = call["dim"] % (len(operands[0]) + 1)
    operands[0].insert(dim, call.fixed(len(operands), "a stack of tensors"))
    return [operands[0]]


@rule(aten.repeat)
def repeat(call: Call) -> Sequence[Layouts]:
    """Repeat each dimension along a fresh axis outside of it."""
    layouts = call.layouts("self")
    repeats = list(call["repeats"])
    padded: Layouts = [UNIT] * (len(repeats) - len(layouts)) + layouts
    return [[Product((Axis(n), layout)) for n, layout in zip(repeats, padded, strict=True)]]


@rule(aten.constant_pad_nd)
def pad(call: Call) -> Sequence[Layouts]:
    """Lay fresh slots before and after a dimension; negative amounts cut it."""
    layouts = list(call.layouts("self"))
    amounts = list(call["pad"])
    # `[left, right, top, bottom]`: the first two are those of the last dimension.
    for i in range(len(amounts) // 2):
        dim = len(layouts) - 1 - i
        layouts[dim] = _pad_dimension(
            layouts[dim], amounts[2 * i], amounts[2 * i + 1], call.why("padding")
        )
    return [layouts]


def _pad_dimension(layout: Layout, before: int, after: int, reason: Reason) -> Layout:
    size = size_of(layout)
    inside = cut(layout, [max(0, -before), size - max(0, -after)], reason)[1]
    ends = [Axis(amount) if amount > 0 else EMPTY for amount in (before, after)]
    return Concat((ends[0], inside, ends[1]))


pattern("*b 2 -> *b", aten.view_as_complex)
pattern("*b -> *b 2", aten.view_as_real)


@rule(aten.flip)
def flip(call: Call) -> Sequence[Layouts]:
    """Reverse the order of slots."""
    layouts = list(call.layouts("self"))
    for dim in call["dims"]:
        backwards = range(size_of(layouts[dim]) - 1, -1, -1)
        if not is_fixed(layouts[dim]):
            layouts[dim] = Permuted(layouts[dim], tuple(backwards))
    return [layouts]


@rule(aten.roll)
def roll(call: Call) -> Sequence[Layouts]:
    """Rotate dimensions, which are fixed; with no dimension named, all of them."""
    layouts = call.layouts("self")
    for dim in call["dims"] or range(len(layouts)):
        call.fix(layouts[dim], "slots are rotated")
    return [layouts]


@rule(aten.unfold)
def unfold(call: Call) -> Sequence[Layouts]:
    """Make windows of a dimension, which is fixed."""
    layouts = list(call.layouts("self"))
    dim = call.dim("dimension")
    call.fix(layouts[dim], "cut into overlapping windows")
    sizes = call.outputs[0].shape
    layouts[dim] = call.fixed(sizes[dim], "windows")
    return [[*layouts, call.fixed(sizes[-1], "a window")]]


@rule(aten.as_strided)
def as_strided(call: Call) -> Sequence[Layouts]:
    """Pass a tensor on that is read as it lies; any other reading of memory fixes it."""
    layouts, sizes = call.layouts("self"), list(call["size"])
    strides = [
        (size, stride) for size, stride in zip(sizes, call["stride"], strict=True) if size > 1
    ]
    old_sizes = [size_of(layout) for layout in layouts]
    # Strides of dimensions of size 1 are never used, so they may differ.
    if sizes == old_sizes and not call["storage_offset"]:
        old_strides = [
            (size, stride) for size, stride in zip(old_sizes, call.strides, strict=True) if size > 1
        ]
        if strides == old_strides:
            return [layouts]
    for layout in layouts:
        call.fix(layout, "memory read by strides")
    return [[call.fixed(size, "memory read by strides") for size in sizes]]
