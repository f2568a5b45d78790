"""Operators that address slots by number: the addressed dimension keeps its numbering."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import Layout, size_of
from graphprune.rules.pointwise import broadcast
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten

ADDRESSED = "slots are addressed by number"


@rule(aten.index, aten._unsafe_index)
def index(call: Call) -> Sequence[Layouts]:
    """Replace the indexed dimensions by those of the indices (NumPy's advanced indexing)."""
    layouts, shape = call.layouts("self"), call.outputs[0].shape
    indexed = [i for i, tensor in enumerate(call["indices"]) if tensor is not None]
    if any(call["indices"][i].dtype in (torch.bool, torch.uint8) for i in indexed):
        return _all_fixed(call)
    for dim in indexed:
        call.fix(layouts[dim], ADDRESSED)
    operands = [call.layouts_of(call["indices"][i]) for i in indexed]
    rank = max(map(len, operands), default=0)
    untouched = [layout for i, layout in enumerate(layouts) if i not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    selected = broadcast(call, operands, shape[at : at + rank])
    return [[*untouched[:at], *selected, *untouched[at:]]]


def _all_fixed(call: Call) -> Sequence[Layouts]:
    for tensor in call.tensors:
        for layout in call.layouts_of(tensor):
            call.fix(layout, ADDRESSED)
    return [[call.fixed(size, ADDRESSED) for size in output.shape] for output in call.outputs]


@rule(aten.index_put, aten._index_put_impl, aten._unsafe_index_put)
def index_put(call: Call) -> Sequence[Layouts]:
    """Write at addressed positions; the dimensions not addressed are shared with the values."""
    layouts = call.layouts("self")
    indexed = [i for i, tensor in enumerate(call["indices"]) if tensor is not None]
    if any(call["indices"][i].dtype in (torch.bool, torch.uint8) for i in indexed):
        return _all_fixed(call)
    untouched = [layout for i, layout in enumerate(layouts) if i not in indexed]
    values = call.layouts("values")
    addressed = [layouts[i] for i in indexed]
    addressed += [layout for i in indexed for layout in call.layouts_of(call["indices"][i])]
    if indexed == list(range(len(indexed))):
        shared = values[max(0, len(values) - len(untouched)) :]
        for mine, its in zip(reversed(shared), reversed(untouched), strict=False):
            if size_of(mine) > 1:
                call.unify(mine, its)
        addressed += values[: len(values) - len(shared)]
    else:
        addressed += [*values, *untouched]
    for layout in addressed:
        call.fix(layout, ADDRESSED)
    return [layouts]


@rule(aten.index_select)
def index_select(call: Call) -> Sequence[Layouts]:
    """Take slots of one dimension by number."""
    layouts, dim = list(call.layouts("self")), call.dim()
    call.fix(layouts[dim], ADDRESSED)
    chosen = call.layouts("index")
    layouts[dim] = chosen[0] if chosen else call.fixed(1, ADDRESSED)
    return [layouts]


@rule(aten.gather, aten.scatter, aten.scatter_add, aten.scatter_reduce)
def gather(call: Call) -> Sequence[Layouts]:
    """Address one dimension element by element; the others are shared where they are whole."""
    layouts, dim = call.layouts("self"), call.dim()
    call.fix(layouts[dim], ADDRESSED)
    index_layouts = call.layouts("index")
    others = [call.layouts("src")] if isinstance(call.arguments.get("src"), torch.Tensor) else []
    for i, layout in enumerate(layouts):
        for operand in (index_layouts, *others):
            if i == dim:
                call.fix(operand[i], ADDRESSED)
            else:
                _share(call, layout, operand[i])
    return [index_layouts if call.func.overloadpacket is aten.gather else layouts]


def _share(call: Call, whole: Layout, part: Layout) -> None:
    if size_of(whole) == size_of(part):
        call.unify(whole, part)
    else:
        call.fix(whole, ADDRESSED)
        call.fix(part, ADDRESSED)
