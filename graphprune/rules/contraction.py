"""Products of matrices, convolutions and look-ups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import UNIT, size_of
from graphprune.rules.pattern import Pattern, pattern
from graphprune.rules.pointwise import broadcast
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten

MATMUL = pattern("m k, k n -> m n", aten.mm)
BATCHED = pattern("b m k, b k n -> b m n", aten.bmm)
pattern("m k, k -> m", aten.mv)
pattern("k, k -> ", aten.dot, aten.vdot)
pattern("0 d, *b -> *b d", aten.embedding)

pattern("0 b i, 0 i o, o -> t b o", aten.conv_tbc)


@rule(aten.linalg_solve_triangular)
def triangular_system(call: Call) -> Sequence[Layouts]:
    """Solve systems side by side; the unknowns of one depend on each other and are fixed."""
    matrix, right_sides = call.layouts("self"), call.layouts("B")
    unknowns = -2 if call["left"] else -1
    for layout in (*matrix[-2:], right_sides[unknowns]):
        call.fix(layout, "unknowns of a system of equations")
    shape = call.outputs[0].shape
    return [[*broadcast(call, [matrix[:-2], right_sides[:-2]], shape[:-2]), *right_sides[-2:]]]


BAG = Pattern.parse("0 d, *n, *m, *w -> b d")
CONVOLUTION = Pattern.parse("b (g i) *s, (g o) i *k, (g o)? -> b (g o) *t")
TRANSPOSED = Pattern.parse("b (g i) *s, (g i) o *k, (g o)? -> b (g o) *t")


@rule(aten.convolution)
def convolution(call: Call) -> Sequence[Layouts]:
    """Sum over the input channels of each group; a transposed weight has its channels exchanged."""
    convolution_pattern = TRANSPOSED if call["transposed"] else CONVOLUTION
    return convolution_pattern.apply(call, call.tensors, {"g": call["groups"]})


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(call: Call) -> Sequence[Layouts]:
    """Sum, average or take the largest of the vectors of each bag; the last also says which."""
    (bags,) = BAG(call)
    return [bags, [], [], bags]


@rule(aten._grouped_mm)
def grouped_product(call: Call) -> Sequence[Layouts]:
    """Multiply groups of rows (the tokens of each expert) by matrices; the groups keep their numbers."""
    *left_groups, rows, left_summed = call.layouts("self")
    *right_groups, right_summed, columns = call.layouts("mat2")
    call.unify(left_summed, right_summed)
    offsets = call.layouts("offs") if call["offs"] is not None else []
    # `[tokens, in] @ [experts, in, out]` has ragged rows, `[experts, rows, in] @ [in, tokens]`
    # ragged columns; of two matrices it is the summed dimension that falls into groups.
    ragged_dims = (
        [rows]
        if not left_groups and right_groups
        else [columns]
        if left_groups and not right_groups
        else []
    )
    ragged_dims += [] if left_groups or right_groups else [left_summed]
    for layout in (*left_groups, *right_groups, *offsets, *(ragged_dims if offsets else [])):
        call.fix(layout, "groups of rows, one after the other")
    if call["bias"] is not None:
        call.unify(call.layouts("bias")[-1], columns)
    group_dims = call.outputs[0].shape[:-2]
    return [[*(call.fixed(size, "groups of rows") for size in group_dims), rows, columns]]


pattern("0 i, 0 i o, 0 -> 0 o", "transformers::grouped_mm_fallback")


@rule(aten._cdist_forward)
def distances(call: Call) -> Sequence[Layouts]:
    """Sum powers of differences between the rows of two matrices; equal features add nothing."""
    *first_batch, rows, features = call.layouts("x1")
    *second_batch, other_rows, other_features = call.layouts("x2")
    call.unify(features, other_features)
    batch = broadcast(call, [first_batch, second_batch], call.outputs[0].shape[:-2])
    return [[*batch, rows, other_rows]]


@rule(aten._trilinear)
def trilinear(call: Call) -> Sequence[Layouts]:
    """Multiply three tensors, each expanded along new dimensions, and sum over some."""
    operands = []
    for number in "123":
        layouts = list(call.layouts(f"i{number}"))
        for dim in sorted(call[f"expand{number}"]):
            layouts.insert(dim, UNIT)
        operands.append(layouts)
    sizes = [max(map(size_of, aligned_layouts)) for aligned_layouts in zip(*operands, strict=True)]
    summed_dims = {dim % len(sizes) for dim in call["sumdim"]}
    product = broadcast(call, operands, sizes)
    return [[layout for dim, layout in enumerate(product) if dim not in summed_dims]]


@rule(aten.addmm, aten.baddbmm)
def added_product(call: Call) -> Sequence[Layouts]:
    """Add a broadcast tensor to a product of matrices."""
    bias, *factors = call.tensors
    product = (MATMUL if factors[0].dim() == 2 else BATCHED).apply(call, factors)
    return [broadcast(call, [product[0], call.layouts_of(bias)], call.outputs[0].shape)]
