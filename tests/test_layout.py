"""Layouts against brute force: which slots each position of a dimension stands for."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.layout import (
    EMPTY,
    UNIT,
    Axis,
    Concat,
    Layout,
    Product,
    Reason,
    can_split,
    cut,
    describe,
    fix,
    free_axes,
    is_fixed,
    kept_size,
    leaves,
    mark_renormalised,
    mask_of,
    regroup,
    resolve,
    size_of,
    slots_of,
    split,
    unify,
)

WHY = Reason("a test", "aten.test", "net.layer", "test.py:1")


def positions(layout: Layout) -> list[tuple[Any, ...]]:
    """Return, for each position, the (axis, slot) pairs that it depends on, by enumeration."""
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return [((layout, slot),) for slot in range(layout.size)]
    if isinstance(layout, Concat):
        return [position for part in layout.parts for position in positions(part)]
    return [sum(each, ()) for each in product(*map(positions, layout.factors))]


def draw_keep(axes: list[Axis], seed: int) -> dict[Axis, np.ndarray]:
    random = np.random.default_rng(seed)
    keep = {axis: random.random(axis.size) < 0.6 for axis in axes if axis.fixed is None}
    for mask in keep.values():
        mask[0] = True
    return keep


axes = st.integers(1, 6).map(Axis)
layouts: st.SearchStrategy[Layout] = st.recursive(
    axes,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: Product(tuple(xs))),
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: Concat(tuple(xs))),
    ),
    max_leaves=5,
).filter(lambda layout: size_of(layout) <= 200)


@given(layouts, st.integers(0, 99))
def test_masks_sizes_and_slots_agree_with_enumeration(layout: Layout, seed: int) -> None:
    keep = draw_keep(list(leaves(layout)), seed)
    stays = [all(keep[axis][slot] for axis, slot in where) for where in positions(layout)]
    assert mask_of(layout, keep).tolist() == stays
    assert kept_size(layout, {axis: int(m.sum()) for axis, m in keep.items()}) == sum(stays)
    for axis in free_axes(layout):
        found = [
            sorted(int(s[i]) for s in slots_of(layout, axis) if s[i] >= 0)
            for i in range(size_of(layout))
        ]
        wanted = [sorted(slot for a, slot in where if a is axis) for where in positions(layout)]
        assert found == wanted


@given(layouts, st.data())
def test_cutting_and_joining_gives_the_layout_back(layout: Layout, data: st.DataObject) -> None:
    count = size_of(layout)
    at = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    pieces = cut(layout, at)
    assert [size_of(p) for p in pieces] == np.diff([0, *at, count]).tolist()
    assert positions(Concat(tuple(pieces))) == positions(layout)


@given(layouts, st.integers(1, 12))
def test_splitting_and_multiplying_gives_the_layout_back(layout: Layout, inner: int) -> None:
    if not can_split(layout, inner):
        return
    outer, last = split(layout, inner, WHY)
    assert size_of(last) == inner
    assert size_of(outer) * inner == size_of(layout)
    assert positions(Product((outer, last))) == positions(layout) or not free_axes(last)


@given(layouts, layouts, st.data(), st.integers(0, 99))
@settings(max_examples=400)
def test_unified_layouts_lose_the_same_positions(
    a: Layout, b: Layout, data: st.DataObject, seed: int
) -> None:
    """THE invariant: whatever is kept of the axes that are left, both sides keep the same."""
    if size_of(a) != size_of(b):
        rest = Axis(abs(size_of(a) - size_of(b)))
        a, b = (Concat((a, rest)), b) if size_of(a) < size_of(b) else (a, Concat((b, rest)))
    unify(a, b, WHY)
    keep = draw_keep([*leaves(a), *leaves(b)], seed)
    assert mask_of(a, keep).tolist() == mask_of(b, keep).tolist()
    assert size_of(a) == size_of(b)


@given(st.lists(layouts, min_size=1, max_size=3), st.data(), st.integers(0, 99))
def test_a_reshape_keeps_row_major_order(
    dims: list[Layout], data: st.DataObject, seed: int
) -> None:
    rest, sizes = int(np.prod([size_of(d) for d in dims])), []
    while rest > 1:
        step = data.draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        sizes.append(step)
        rest //= step
    new = regroup(dims, sizes, WHY)
    assert [size_of(layout) for layout in new] == sizes
    keep = draw_keep([axis for d in (*dims, *new) for axis in leaves(d)], seed)
    flat = [mask_of(Product(tuple(side)), keep).tolist() for side in (dims, new)]
    assert flat[0] == flat[1]


def test_an_axis_takes_the_form_of_what_it_is_unified_with() -> None:
    flat, heads, size = Axis(12), Axis(3), Axis(4)
    unify(flat, Product((heads, size)), WHY)
    assert resolve(flat) == Product((heads, size))
    assert describe(flat, {heads: "heads", size: "dim"}) == "(heads dim)"


def test_a_fused_projection_taken_apart_shares_heads() -> None:
    fused = Axis(24)
    query, key, _ = cut(fused, [8, 16])
    for part in (query, key):
        split(part, 4, WHY)
    unify(query, key, WHY)
    assert describe(fused) == "((2 4) + (2 4) + 8)"
    first, second = resolve(fused).parts[:2]  # type: ignore[union-attr]
    assert first == second


def test_equal_pieces_seen_as_a_stack_share_their_slots() -> None:
    a, b = Axis(5), Axis(5)
    outer = Axis(2)
    unify(Concat((a, b)), Product((outer, Axis(5))), WHY)
    assert resolve(a) is resolve(b)
    assert is_fixed(outer)


def test_what_does_not_fit_is_fixed_with_the_reason() -> None:
    a, b = Product((Axis(6), Axis(4))), Product((Axis(8), Axis(3)))
    unify(a, b, WHY)
    assert is_fixed(a)
    assert is_fixed(b)
    assert {axis.fixed for axis in leaves(a)} == {WHY}
    other = Reason("later")
    fix(a, other)
    assert other not in {axis.fixed for axis in leaves(a)}


def test_sizes_that_differ_are_fixed() -> None:
    a, b = Axis(3), Axis(4)
    unify(a, b, WHY)
    assert a.fixed == b.fixed == WHY


def test_an_axis_inside_its_own_layout_is_fixed() -> None:
    axis = Axis(4)
    unify(Concat((axis, Axis(2))), Concat((Axis(2), axis)), WHY)
    assert size_of(axis) == 4
    keep = draw_keep(list(leaves(axis)), 0)
    assert len(mask_of(axis, keep)) == 4


@pytest.mark.parametrize("size", [5, 100, 4096])
def test_an_axis_shifted_against_itself_ends_and_stays_consistent(size: int) -> None:
    axis = Axis(size)
    late, early = cut(axis, [1])[1], cut(axis, [size - 1])[0]
    unify(late, early, WHY)
    keep = draw_keep(list(leaves(axis)), 0)
    assert mask_of(late, keep).tolist() == mask_of(early, keep).tolist()


def test_marks_follow_an_axis_into_its_parts() -> None:
    axis = Axis(6)
    mark_renormalised(axis, WHY)
    outer, inner = split(axis, 2, WHY)
    assert outer.renormalised == inner.renormalised == (WHY,)  # type: ignore[union-attr]
    other = Axis(6)
    unify(other, axis, WHY)
    assert all(leaf.renormalised for leaf in leaves(other))


def test_fixing_reaches_what_is_bound_later() -> None:
    fixed, free = Axis(6, WHY), Product((Axis(2), Axis(3)))
    unify(fixed, free, Reason("other"))
    assert {leaf.fixed for leaf in leaves(free)} == {WHY}


def test_layouts_are_not_numbers() -> None:
    with pytest.raises(TypeError, match="compared an axis with the number 3"):
        assert Axis(3) == 3
    for layout in (Axis(3), UNIT, EMPTY):
        with pytest.raises(TypeError, match="use size_of"):
            len(layout)
    assert size_of(UNIT) == 1
    assert size_of(EMPTY) == 0
