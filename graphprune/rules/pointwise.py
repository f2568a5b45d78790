"""Operators that act on each element alone: dimensions meet from the right and broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import UNIT, Layout, size_of
from graphprune.rules.registry import POINTWISE, Call, Layouts, register

aten, prims = torch.ops.aten, torch.ops.prims


def broadcast(call: Call, operands: Sequence[Layouts], shape: Sequence[int]) -> Layouts:
    """Return the layouts of operands broadcast to `shape`, unified where they are not of size 1."""
    result: Layouts = []
    # Counted from the last dimension: `[channels]` meets the last of `[rows, channels]`.
    for back in range(len(shape), 0, -1):
        shared_layout: Layout | None = None
        for layouts in operands:
            if len(layouts) < back or size_of(layouts[-back]) == 1:
                continue
            if shared_layout is None:
                shared_layout = layouts[-back]
            else:
                call.unify(shared_layout, layouts[-back])
        result.append(UNIT if shared_layout is None else shared_layout)
    return result


def pointwise(call: Call) -> Sequence[Layouts]:
    """Every output has the broadcast shape of all operands."""
    operands = [call.layouts_of(tensor) for tensor in call.tensors]
    return [broadcast(call, operands, output.shape) for output in call.outputs]


register(
    pointwise,
    POINTWISE,
    aten._conj,
    aten._neg_view,
    aten._prelu_kernel,
    aten._to_copy,
    aten.addcmul,
    aten.alias,
    aten.clone,
    aten.copy,
    aten.detach,
    aten.empty_like,
    aten.fill,
    aten.floor_divide,
    aten.full_like,
    aten.lift_fresh,
    aten.masked_fill,
    aten.ones_like,
    aten.rrelu_with_noise,
    aten.zero,
    aten.zeros_like,
    prims.convert_element_type,
    prims.where,
)
