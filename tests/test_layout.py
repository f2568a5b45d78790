"""Layouts against brute force: which slots each position of a dimension stands for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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
    describe,
    fix,
    flatten_nesting,
    free_axes,
    is_fixed,
    leaves,
    mark_renormalised,
    resolve,
    size_of,
    split,
    unify,
    why_fixed,
)
from graphprune.masks import kept_size, mask_of, slots_of
from graphprune.rules.reshape import regroup

STEADY = settings(deadline=None, derandomize=True, database=None)
WHY = Reason("a test", "aten.test", "net.layer", "test.py:1")


def positions(layout: Layout) -> list[tuple[Any, ...]]:
    """Return, for each position, the (axis, slot) pairs that it depends on, by enumeration."""
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return [((layout, slot),) for slot in range(layout.size)]
    if isinstance(layout, Concat):
        return [position for part in layout.parts for position in positions(part)]
    if isinstance(layout, Permuted):
        return [positions(layout.inner)[i] for i in layout.order]
    return [sum(each, ()) for each in product(*map(positions, layout.factors))]


def same_slots(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> bool:
    """Say whether positions depend on the same slots, once axes are followed to what they became."""

    became = {axis: positions(axis) for where in before for axis, _ in where}

    def free(pairs: Iterable[Any]) -> set[Any]:
        return {(axis, slot) for axis, slot in pairs if axis.fixed is None}

    followed = ([p for axis, slot in where for p in became[axis][slot]] for where in before)
    return [free(pairs) for pairs in followed] == [free(where) for where in after]


def draw_keep(axes: list[Axis], seed: int) -> dict[Axis, np.ndarray]:
    random = np.random.default_rng(seed)
    keep = {axis: random.random(axis.size) < 0.6 for axis in axes if axis.fixed is None}
    for mask in keep.values():
        mask[0] = True
    return keep


def in_some_order(layout: Layout, seed: int) -> Layout:
    """Return the layout backwards, rotated by one or in disorder."""
    size = size_of(layout)
    if seed % 3 == 0:
        order = np.arange(size)[::-1]
    else:
        moved = np.roll(np.arange(size), 1)
        order = moved if seed % 3 == 1 else np.random.default_rng(seed).permutation(size)
    return Permuted(layout, tuple(order.tolist()))


axes = st.integers(1, 6).map(Axis)
layouts: st.SearchStrategy[Layout] = st.recursive(
    axes,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: Product(tuple(xs))),
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: Concat(tuple(xs))),
        st.builds(in_some_order, inner, st.integers(0, 99)),
    ),
    max_leaves=5,
).filter(lambda layout: size_of(layout) <= 200)


@STEADY
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


@STEADY
@given(layouts, st.data())
def test_cutting_and_joining_gives_the_layout_back(layout: Layout, data: st.DataObject) -> None:
    count, before = size_of(layout), positions(layout)
    at = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    pieces = cut(layout, at, WHY)
    assert [size_of(p) for p in pieces] == np.diff([0, *at, count]).tolist()
    assert same_slots(positions(layout), positions(Concat(tuple(pieces))))
    assert same_slots(before, positions(layout))


@STEADY
@given(layouts, st.integers(1, 12))
def test_splitting_and_multiplying_gives_the_layout_back(layout: Layout, inner: int) -> None:
    if not can_split(layout, inner):
        return
    before = positions(layout)
    outer, last = split(layout, inner, WHY)
    assert size_of(last) == inner
    assert size_of(outer) * inner == size_of(layout)
    assert positions(Product((outer, last))) == positions(layout) or not free_axes(last)
    assert same_slots(before, positions(layout))


@settings(STEADY, max_examples=400)
@given(layouts, layouts, st.data(), st.integers(0, 99))
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


@STEADY
@given(st.lists(layouts, min_size=1, max_size=3), st.data(), st.integers(0, 99))
def test_a_reshape_keeps_row_major_order(
    dims: list[Layout], data: st.DataObject, seed: int
) -> None:
    rest, sizes = int(np.prod([size_of(d) for d in dims])), []
    assume(rest <= 2000)
    while rest > 1:
        step = data.draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        sizes.append(step)
        rest //= step
    before = positions(Product(tuple(dims)))
    new = regroup(dims, sizes, WHY)
    assert same_slots(before, positions(Product(tuple(dims))))
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
    query, key, _ = cut(fused, [8, 16], WHY)
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
    late, early = cut(axis, [1], WHY)[1], cut(axis, [size - 1], WHY)[0]
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


@settings(STEADY, max_examples=200)
@given(st.lists(st.tuples(layouts, layouts), min_size=2, max_size=4), st.integers(0, 99))
def test_what_was_unified_stays_so_whatever_is_unified_later(
    pairs: list[tuple[Layout, Layout]], seed: int
) -> None:
    """Layouts share axes here: each right side is also joined to the next left side."""
    said: list[tuple[Layout, Layout]] = []
    for (a, b), (c, _) in pairwise([*pairs, pairs[0]]):
        left, right = Concat((a, b)), Concat((b, a))
        shared = (Product((a, c)), Product((c, a)))
        for x, y in ((left, right), shared):
            unify(x, y, WHY)
            said.append((x, y))
    keep = draw_keep([axis for x, y in said for side in (x, y) for axis in leaves(side)], seed)
    for x, y in said:
        assert mask_of(x, keep).tolist() == mask_of(y, keep).tolist()


@STEADY
@given(layouts, layouts, st.integers(0, 99))
def test_fixed_axes_are_never_cut(a: Layout, b: Layout, seed: int) -> None:
    fix(a, WHY)
    both = Concat((a, b)), Concat((b, a))
    unify(*both, Reason("later"))
    keep = draw_keep([*leaves(both[0]), *leaves(both[1])], seed)
    assert mask_of(a, keep).all()
    assert {axis.fixed for axis in leaves(a)} <= {WHY}
    assert all(axis.fixed for axis in leaves(a))


def test_the_first_reason_wins_through_bindings() -> None:
    first, free = Axis(6, WHY), Axis(6)
    unify(free, first, Reason("the unification"))
    fix(free, Reason("later"))
    assert why_fixed(free) == WHY
    outer, inner = split(free, 3, Reason("a split"))
    assert why_fixed(outer) == why_fixed(inner) == WHY


def test_an_axis_is_not_bound_to_a_product_of_itself() -> None:
    axis = Axis(4)
    twice = Product((axis, Axis(1)))
    unify(axis, twice, WHY)
    assert axis.bound is None
    assert axis.fixed is None  # one slot wide: nothing was said
    other = Axis(0)
    unify(other, Product((other, Axis(3))), WHY)
    assert size_of(other) == 0
    assert [axis.size for axis in leaves(other)] == [] or is_fixed(other)


def test_a_transpose_of_equal_factors_unified_with_itself() -> None:
    a, b = Axis(3), Axis(3)
    unify(Product((a, b)), Product((b, a)), WHY)
    keep = draw_keep(list(leaves(Product((a, b)))), 3)
    one, other = mask_of(Product((a, b)), keep), mask_of(Product((b, a)), keep)
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize("pieces", [10, 128, 1000])
def test_many_pieces_take_little_time_and_depth(pieces: int) -> None:
    a = Concat(tuple(Axis(2) for _ in range(pieces)))
    b = Concat((Axis(1), *(Axis(2) for _ in range(pieces - 1)), Axis(1)))
    started = time.process_time()
    unify(a, b, WHY)
    keep = draw_keep([*leaves(a), *leaves(b)], 0)
    assert mask_of(a, keep).tolist() == mask_of(b, keep).tolist()
    assert time.process_time() - started < 5


def test_deep_nesting_stays_consistent() -> None:
    left: Layout = Axis(2)
    right: Layout = Axis(2)
    for _ in range(100):
        left, right = Concat((Axis(1), left)), Concat((right, Axis(1)))
    unify(left, right, WHY)
    keep = draw_keep([*leaves(left), *leaves(right)], 0)
    assert mask_of(left, keep).tolist() == mask_of(right, keep).tolist()


def test_long_chains_of_bindings_are_followed() -> None:
    chain = [Axis(6) for _ in range(3000)]
    for a, b in pairwise(chain):
        unify(b, a, WHY)
    split(chain[-1], 2, WHY)
    assert resolve(chain[0]) == resolve(chain[-1])
    assert describe(chain[0]) == "(3 2)"


@pytest.mark.parametrize("shift", [1, 2, 3, 64])
def test_shifts_by_any_amount_end(shift: int) -> None:
    axis = Axis(192)
    unify(cut(axis, [shift], WHY)[1], cut(axis, [192 - shift], WHY)[0], WHY)
    keep = draw_keep(list(leaves(axis)), 0)
    mask = mask_of(axis, keep)
    assert mask[shift:].tolist() == mask[:-shift].tolist()


def test_long_chains_of_bindings_and_deep_nests_resolve() -> None:
    axes = [Axis(6) for _ in range(5000)]
    for first, second in pairwise(axes):
        unify(first, second, WHY)
    assert resolve(axes[0]) is resolve(axes[-1])
    column: Layout = axes[0]
    for _ in range(5000):
        column = flatten_nesting(Product((column,)))
    assert size_of(column) == 6
