"""Operators that address slots by number: the addressed dimension keeps its numbering.

Only where all slots are taken once, in an order that the model holds, may some go: the others keep
that order, and what holds it is numbered anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.layout import Layout, Permuted, is_fixed, size_of
from graphprune.rules.pointwise import broadcast
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten

WHY_ADDRESSED = "slots are addressed by number"


@rule(aten.index, aten._unsafe_index)
def index(call: Call) -> Sequence[Layouts]:
    """Replace the indexed dimensions by those of the indices (NumPy's advanced indexing)."""
    layouts, shape = call.layouts("self"), call.outputs[0].shape
    index_tensors = [
        (dim, tensor) for dim, tensor in enumerate(call["indices"]) if tensor is not None
    ]
    if len(index_tensors) == 1:
        dim, tensor = index_tensors[0]
        reordered = _reorder(call, layouts[dim], tensor)
        if reordered is not None:
            return [[*layouts[:dim], reordered, *layouts[dim + 1 :]]]
    indices = _read_indices(call)
    indexed = list(indices)
    for dim in indexed:
        call.fix(layouts[dim], WHY_ADDRESSED)
    # Of `x`, `[a, b, c, d]`, with `i` and `j`, `[n]`: `x[:, i, j]` is `[a, n, d]`, `x[:, i, :, j]` is
    # `[n, a, c]`, since what is selected stands first where the indices are no neighbours.
    selected_rank = len(shape) - len(layouts) + len(indexed)
    untouched = [layout for i, layout in enumerate(layouts) if i not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    insert_at = indexed[0] if adjacent else 0
    index_layouts = [operand for operand in indices.values() if operand is not None]
    selected: Layouts
    if len(index_layouts) < len(indexed):  # a mask: as many slots as it is true for
        for operand in index_layouts:
            for layout in operand:
                call.fix(layout, WHY_ADDRESSED)
        selected = [
            call.fixed(size, WHY_ADDRESSED) for size in shape[insert_at : insert_at + selected_rank]
        ]
    else:
        selected = broadcast(call, index_layouts, shape[insert_at : insert_at + selected_rank])
    return [[*untouched[:insert_at], *selected, *untouched[insert_at:]]]


def _reorder(call: Call, layout: Layout, index: Tensor) -> Layout | None:
    """Return a dimension whose slots come in the order of known numbers; None if it is another case."""
    numbers, size = call.numbers_of(index), size_of(layout)
    if numbers is None or is_fixed(layout):
        return None
    # `x[:, [-1, 0]]` counts from the end.
    order = tuple(number + size if number < 0 else number for number in numbers.values)
    if sorted(order) != list(range(size)):
        return None
    # The name is empty where the numbers stand in the model's code.
    call.addressed[numbers.name] = layout
    reordered = Permuted(layout, order)
    if numbers.name:
        call.unify(call.layouts_of(index)[0], reordered)
    return reordered


def _read_indices(call: Call) -> dict[int, Layouts | None]:
    """Return, by indexed dimension, the layouts of the numbers there; None under a mask, now fixed."""
    layouts_by_dim: dict[int, Layouts | None] = {}
    dim = 0
    for tensor in call["indices"]:
        if tensor is not None and tensor.dtype in (torch.bool, torch.uint8):
            for layout in call.layouts_of(tensor):
                call.fix(layout, WHY_ADDRESSED)
                # A mask indexes as many dimensions as it has.
                layouts_by_dim[dim], dim = None, dim + 1
            continue
        if tensor is not None:
            layouts_by_dim[dim] = call.layouts_of(tensor)
        dim += 1
    return layouts_by_dim


@rule(aten.index_put, aten._index_put_impl, aten._unsafe_index_put)
def index_put(call: Call) -> Sequence[Layouts]:
    """Write at addressed positions; the dimensions not addressed are shared with the values."""
    layouts = call.layouts("self")
    indices = _read_indices(call)
    indexed = list(indices)
    untouched = [layout for i, layout in enumerate(layouts) if i not in indexed]
    values = call.layouts("values")
    addressed = [layouts[i] for i in indexed]
    addressed += [layout for index_layouts in indices.values() for layout in index_layouts or ()]
    if indexed == list(range(len(indexed))):
        # Values broadcast against `[selected..., untouched...]`:
        # their last dimensions are the untouched.
        shared = values[max(0, len(values) - len(untouched)) :]
        for value_layout, untouched_layout in zip(
            reversed(shared), reversed(untouched), strict=False
        ):
            if size_of(value_layout) > 1:
                call.unify(value_layout, untouched_layout)
        addressed += values[: len(values) - len(shared)]
    else:
        addressed += [*values, *untouched]
    for layout in addressed:
        call.fix(layout, WHY_ADDRESSED)
    return [layouts]


@rule(aten.index_select)
def index_select(call: Call) -> Sequence[Layouts]:
    """Take slots of one dimension by number."""
    layouts, dim = list(call.layouts("self")), call.dim()
    if not layouts:  # a scalar takes 0 as a dimension, and has none
        return [layouts]
    reordered = _reorder(call, layouts[dim], call["index"])
    if reordered is None:
        call.fix(layouts[dim], WHY_ADDRESSED)
        chosen = call.layouts("index")
        reordered = chosen[0] if chosen else call.fixed(1, WHY_ADDRESSED)
    layouts[dim] = reordered
    return [layouts]


@rule(aten.gather, aten.scatter, aten.scatter_add, aten.scatter_reduce)
def gather(call: Call) -> Sequence[Layouts]:
    """Address one dimension element by element; the others are shared where they are whole."""
    layouts, dim = call.layouts("self"), call.dim()
    call.fix(layouts[dim], WHY_ADDRESSED)
    index_layouts = call.layouts("index")
    sources = [call.layouts("src")] if isinstance(call.arguments.get("src"), torch.Tensor) else []
    for i, layout in enumerate(layouts):
        for operand in (index_layouts, *sources):
            if i == dim:
                call.fix(operand[i], WHY_ADDRESSED)
            else:
                _share(call, layout, operand[i])
    return [index_layouts if call.func.overloadpacket is aten.gather else layouts]


def _share(call: Call, layout: Layout, operand_layout: Layout) -> None:
    if size_of(layout) == size_of(operand_layout):
        call.unify(layout, operand_layout)
    else:
        call.fix(layout, WHY_ADDRESSED)
        call.fix(operand_layout, WHY_ADDRESSED)


@rule(aten.index_add, aten.index_copy, aten.index_reduce, aten.index_fill)
def index_add(call: Call) -> Sequence[Layouts]:
    """Write to slots of one dimension by number; all other dimensions are shared with the source."""
    layouts, dim = call.layouts("self"), call.dim()
    written = [call.layouts("source")] if "source" in call.arguments else []
    for operand in (layouts, *written) if layouts else ():
        call.fix(operand[dim], WHY_ADDRESSED)
        for i, (target_layout, source_layout) in enumerate(zip(layouts, operand, strict=True)):
            if i != dim:
                call.unify(target_layout, source_layout)
    for layout in call.layouts("index"):
        call.fix(layout, WHY_ADDRESSED)
    return [layouts]


@rule(aten.masked_scatter)
def masked_scatter(call: Call) -> Sequence[Layouts]:
    """Write a source's elements one after the other where a mask is true.

    Along last dimensions in which the mask repeats itself (it is expanded there), whole rows of the
    source are written, so those dimensions are shared.
    """
    layouts, source, mask = (call.layouts(name) for name in ("self", "source", "mask"))
    shared_count = 0
    for target, written in zip(reversed(layouts), reversed(source), strict=False):
        if not _is_repeated(call["mask"], shared_count + 1) or size_of(target) != size_of(written):
            break
        shared_count += 1
    for operand in (layouts, source, mask):
        for layout in operand[: len(operand) - shared_count]:
            call.fix(layout, "written one after the other")
    # Dimensions are counted from the last, since a mask may have fewer than the tensor.
    for back in range(1, shared_count + 1):
        call.unify(layouts[-back], source[-back])
        if len(mask) >= back and size_of(mask[-back]) > 1:
            call.unify(layouts[-back], mask[-back])
    return [layouts]


def _is_repeated(tensor: Tensor, back: int) -> bool:
    """Say whether all slots of the dimension `back` from the last are one in memory, or it is absent."""
    return tensor.dim() < back or tensor.shape[-back] == 1 or tensor.stride(-back) == 0


@rule(
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
    aten.searchsorted,
    aten.repeat_interleave.Tensor,
    aten.multinomial,
)
def select_by_values(call: Call) -> Sequence[Layouts]:
    """Make a result whose slots, or their number, are decided by the values: all is fixed."""
    why = "values decide which slots there are"
    for tensor in call.tensors:
        for layout in call.layouts_of(tensor):
            call.fix(layout, why)
    return [[call.fixed(size, why) for size in output.shape] for output in call.outputs]
