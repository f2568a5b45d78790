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
    matrix, sides = call.layouts("self"), call.layouts("B")
    unknowns = -2 if call["left"] else -1
    for layout in (*matrix[-2:], sides[unknowns]):
        call.fix(layout, "unknowns of a system of equations")
    shape = call.outputs[0].shape
    return [[*broadcast(call, [matrix[:-2], sides[:-2]], shape[:-2]), *sides[-2:]]]


BAG = Pattern.parse("0 d, *n, *m, *w -> b d")
CONVOLUTION = Pattern.parse("b (g i) *s, (g o) i *k, (g o)? -> b (g o) *t")
TRANSPOSED = Pattern.parse("b (g i) *s, (g i) o *k, (g o)? -> b (g o) *t")


@rule(aten.convolution)
def convolution(call: Call) -> Sequence[Layouts]:
    """Sum over the input channels of each group; a transposed weight has its channels exchanged."""
    found = TRANSPOSED if call["transposed"] else CONVOLUTION
    return found.apply(call, call.tensors, {"g": call["groups"]})


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(call: Call) -> Sequence[Layouts]:
    """Sum, average or take the largest of the vectors of each bag; the last also says which."""
    (bags,) = BAG(call)
    return [bags, [], [], bags]


@rule(aten._grouped_mm)
def grouped_product(call: Call) -> Sequence[Layouts]:
    """Multiply groups of rows (the tokens of each expert) by matrices; the groups keep their numbers."""
    *around, rows, summed = call.layouts("self")
    *its_around, its_summed, columns = call.layouts("mat2")
    call.unify(summed, its_summed)
    offsets = call.layouts("offs") if call["offs"] is not None else []
    ragged = [rows] if not around and its_around else [columns] if around and not its_around else []
    ragged += [] if around or its_around else [summed]
    for layout in (*around, *its_around, *offsets, *(ragged if offsets else [])):
        call.fix(layout, "groups of rows, one after the other")
    if call["bias"] is not None:
        call.unify(call.layouts("bias")[-1], columns)
    groups = call.outputs[0].shape[:-2]
    return [[*(call.fixed(n, "groups of rows") for n in groups), rows, columns]]


pattern("0 i, 0 i o, 0 -> 0 o", "transformers::grouped_mm_fallback")


@rule(aten._cdist_forward)
def distances(call: Call) -> Sequence[Layouts]:
    """Sum powers of differences between the rows of two matrices; equal features add nothing."""
    *first, rows, features = call.layouts("x1")
    *second, other_rows, other_features = call.layouts("x2")
    call.unify(features, other_features)
    around = broadcast(call, [first, second], call.outputs[0].shape[:-2])
    return [[*around, rows, other_rows]]


@rule(aten._trilinear)
def trilinear(call: Call) -> Sequence[Layouts]:
    """Multiply three tensors, each expanded along new dimensions, and sum over some."""
    operands = []
    for number in "123":
        layouts = list(call.layouts(f"i{number}"))
        for dim in sorted(call[f"expand{number}"]):
            layouts.insert(dim, UNIT)
        operands.append(layouts)
    sizes = [max(map(size_of, met)) for met in zip(*operands, strict=True)]
    summed = {dim % len(sizes) for dim in call["sumdim"]}
    product = broadcast(call, operands, sizes)
    return [[layout for dim, layout in enumerate(product) if dim not in summed]]


@rule(aten.addmm, aten.baddbmm)
def added_product(call: Call) -> Sequence[Layouts]:
    """Add a broadcast tensor to a product of matrices."""
    bias, *factors = call.tensors
    product = (MATMUL if factors[0].dim() == 2 else BATCHED).apply(call, factors)
    return [broadcast(call, [product[0], call.layouts_of(bias)], call.outputs[0].shape)]
