"""What a tensor dimension is made of, and how two dimensions are made the same.

The layout of a dimension is an `Axis` (slots that may be removed one by one), a `Product` of layouts
(row-major, what a reshape makes), a `Concat` of layouts (what a concatenation makes) or a `Permuted`
layout (what a flip makes). `unify` is the one way to say that two dimensions must lose the same
slots; what it cannot express it fixes, and a fixed axis is never cut, so the answer is always safe.
Nothing here knows about torch.

A dimension of size 6 in each kind of layout, and what may go from it:

    Axis(6)                   0  1  2  3  4  5       any position

    Product((heads, dim))     h0 h0 h0 h1 h1 h1      a head: three neighbours
                              d0 d1 d2 d0 d1 d2      a dim: every third position

    Concat((a, b))            a0 a1 b0 b1 b2 b3      a slot of a, wherever else a stands; or one of b

    Permuted(c, (5, ..., 0))  c5 c4 c3 c2 c1 c0      a slot of c, which stands in order elsewhere

A reshape from 12 to (3, 4) finds out that the axis of 12 is a product, so the axis is *bound* to it, and
everything else that was made of the axis is a product from then on:

    >>> channels, heads, dim = Axis(12), Axis(3), Axis(4)
    >>> unify(channels, Product((heads, dim)), Reason("a reshape"))
    >>> describe(channels, {heads: "heads", dim: "dim"})
    '(heads dim)'

Sizes that do not fit are no error: both sides stay whole, and say why.

    >>> twelve, nine = Axis(12), Axis(9)
    >>> unify(twelve, nine, Reason("a sum", "aten.add"))
    >>> why_fixed(twelve)
    Reason(why='a sum', operator='aten.add', module='', source='')
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import TypeAlias

import numpy as np

# A dimension cut into more pieces than this, or nested deeper, has no structure that anyone would
# prune by.
MAX_PIECES = 128


@dataclass(frozen=True)
class Reason:
    """Why an axis may not be cut, or may be cut only inexactly, and the operator that says so."""

    why: str
    operator: str = ""
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        location = ", ".join(word for word in (self.operator, self.module, self.source) if word)
        return f"{self.why} ({location})" if location else self.why


class _NotANumber:
    """Layouts are not numbers and have no length: taking one for the other is refused."""

    __slots__ = ()

    def __len__(self) -> int:
        raise TypeError("a layout has no length; use size_of(layout)")


class Axis(_NotANumber):
    """A set of `size` slots that can be removed one by one, unless `fixed` says why not.

    Attributes:
        size: number of slots.
        fixed: why no slot may be removed, or None.
        fixed_here: whether `fixed` was said of this very axis, not of one that it is tied to.
        renormalised: operators that take a statistic along the axis, so that cutting it is inexact.
        bound: the layout that this axis turned out to be, or None.
        ties: what else this axis was made to lose slots with, and by what; None where it is a part
            of the other or the other of it.

    """

    __slots__ = ("bound", "fixed", "fixed_here", "renormalised", "size", "ties")

    def __init__(self, size: int, fixed: Reason | None = None) -> None:
        self.size = size
        self.fixed = fixed
        self.fixed_here = fixed is not None
        self.renormalised: tuple[Reason, ...] = ()
        self.bound: Layout | None = None
        self.ties: list[tuple[Layout, Reason | None]] = []

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int):
            raise TypeError(f"compared an axis with the number {other}; compare its size instead")
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{self.size}{'!' if self.fixed else ''}"


@dataclass(frozen=True, repr=False)
class Product(_NotANumber):
    """Layouts multiplied together, the last one varying fastest. The empty product has size 1."""

    factors: tuple[Layout, ...]

    def __repr__(self) -> str:
        return f"({' '.join(map(repr, self.factors))})"


@dataclass(frozen=True, repr=False)
class Concat(_NotANumber):
    """Layouts laid end to end. The empty concatenation has size 0."""

    parts: tuple[Layout, ...]

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False)
class Permuted(_NotANumber):
    """A layout in another order: position `i` is position `order[i]` of `inner`.

    What is kept of it comes in that order too: of slots a b c d, reversed, without b, are left d c a.
    """

    inner: Layout
    order: tuple[int, ...]

    def __repr__(self) -> str:
        return f"permuted {self.inner!r}"


Layout: TypeAlias = Axis | Product | Concat | Permuted

UNIT = Product(())
EMPTY = Concat(())


def resolve(layout: Layout) -> Layout:
    """Return the layout in normal form: bindings followed, nesting flattened, units dropped."""
    if isinstance(layout, Axis):
        return _resolve_axis(layout)
    if isinstance(layout, Product):
        factors: list[Layout] = []
        for factor in map(resolve, layout.factors):
            factors.extend(factor.factors if isinstance(factor, Product) else (factor,))
        if EMPTY in factors:
            return EMPTY
        return factors[0] if len(factors) == 1 else Product(tuple(factors))
    if isinstance(layout, Permuted):
        return _resolve_permuted(layout)
    parts: list[Layout] = []
    for part in map(resolve, layout.parts):
        parts.extend(part.parts if isinstance(part, Concat) else (part,))
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def flatten_nesting(layout: Layout) -> Layout:
    """Return the layout without nesting; an axis stays the one that it is, bound or not."""
    return layout if isinstance(layout, Axis) else resolve(layout)


def _resolve_axis(axis: Axis) -> Layout:
    """Follow bindings, however many, and remember where they lead."""
    if axis.bound is None:
        # A single slot is never cut, so it is the empty product, and (1 12) equals 12.
        return UNIT if axis.size == 1 else axis
    passed: list[Axis] = []
    layout: Layout = axis
    while isinstance(layout, Axis) and layout.bound is not None:
        passed.append(layout)
        layout = layout.bound
    layout = resolve(layout)
    for link in passed:  # path compression, as in union-find: the next look-up takes one step
        link.bound = layout
    return layout


def _resolve_permuted(layout: Permuted) -> Layout:
    """Follow one order after the other; slots that come out in their own are not permuted."""
    inner, order = resolve(layout.inner), layout.order
    if isinstance(inner, Permuted):
        # position i is position order[i] of one whose position j is position inner.order[j]
        order = tuple(map(inner.order.__getitem__, order))
        inner = inner.inner
    in_order = all(i == position for i, position in enumerate(order))
    return inner if in_order else Permuted(inner, order)


def size_of(layout: Layout) -> int:
    """Return the number of positions along a dimension of this layout."""
    if isinstance(layout, Axis):
        return layout.size
    if isinstance(layout, Permuted):
        return len(layout.order)
    if isinstance(layout, Product):
        return prod(map(size_of, layout.factors))
    return sum(map(size_of, layout.parts))


def parts_of(layout: Product | Concat | Permuted) -> tuple[Layout, ...]:
    """Return the layouts that one is made of: factors, pieces, or the one that is permuted."""
    if isinstance(layout, Product):
        return layout.factors
    return layout.parts if isinstance(layout, Concat) else (layout.inner,)


def leaves(layout: Layout) -> Iterator[Axis]:
    """Yield the axes of a layout from left to right, repeated where they repeat."""
    resolved = resolve(layout)
    if isinstance(resolved, Axis):
        yield resolved
    else:
        for inner in parts_of(resolved):
            yield from leaves(inner)


def axes_as_written(layout: Layout) -> Iterator[Axis]:
    """Yield the axes that the layout was made of, whatever they turned out to be."""
    if isinstance(layout, Axis):
        yield layout
    else:
        for inner in parts_of(layout):
            yield from axes_as_written(inner)


def free_axes(layout: Layout) -> list[Axis]:
    """Return the axes of a layout that may be cut, in order, each once."""
    return list(dict.fromkeys(axis for axis in leaves(layout) if axis.fixed is None))


def is_fixed(layout: Layout) -> bool:
    """Say whether no position along the layout can ever be removed."""
    return all(axis.fixed is not None for axis in leaves(layout))


def why_fixed(layout: Layout) -> Reason | None:
    """Return the reason of the first fixed axis in the layout, or None."""
    return next((axis.fixed for axis in leaves(layout) if axis.fixed is not None), None)


def fix(layout: Layout, reason: Reason) -> None:
    """Forbid the removal of any slot of the layout; axes that are fixed already keep their reason."""
    for axis in leaves(layout):
        if axis.fixed is None:
            axis.fixed, axis.fixed_here = reason, True


def _fix_like(layout: Layout, other: Layout, reason: Reason) -> None:
    """Forbid removals along a layout because there are none along one that it is tied to."""
    inherited = why_fixed(other)
    if inherited is None:
        # The other is UNIT or EMPTY: nothing in it can be cut, and nothing says why.
        fix(layout, reason)
        return
    for axis in leaves(layout):
        if axis.fixed is None:
            axis.fixed = inherited


def mark_renormalised(layout: Layout, reason: Reason) -> None:
    """Record that an operator takes a statistic along the layout, so that cutting it is inexact."""
    for axis in leaves(layout):
        if reason not in axis.renormalised:
            axis.renormalised = (*axis.renormalised, reason)


def unify(a: Layout, b: Layout, reason: Reason) -> None:
    """Make two layouts lose the same slots from now on; what does not fit is fixed, for `reason`.

    >>> a, b, c = Axis(4), Axis(8), Axis(12)
    >>> unify(Concat((a, b)), c, Reason("a sum"))  # now c is a and b, end to end
    >>> c.bound == Concat((a, b))
    True
    """
    x, y = resolve(a), resolve(b)
    if x != y and not (is_fixed(x) and is_fixed(y)):
        _tie(a, b, reason)
        _unify(x, y, reason, 0)


def _tie(a: Layout, b: Layout, reason: Reason | None) -> None:
    for axis in axes_as_written(a):
        axis.ties.append((b, reason))
    for axis in axes_as_written(b):
        axis.ties.append((a, reason))


def _unify(a: Layout, b: Layout, reason: Reason, depth: int) -> None:
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    # The order of the cases matters: what is fixed fixes the other before anything is bound to it, and a
    # lone axis takes on any structure before two structures are compared.
    if size_of(a) != size_of(b) or depth > MAX_PIECES:
        _fix_both(a, b, reason)
    elif is_fixed(a):
        _fix_like(b, a, reason)
    elif is_fixed(b):
        _fix_like(a, b, reason)
    elif isinstance(b, Axis):
        _bind(b, a, reason)
    elif isinstance(a, Axis):
        _bind(a, b, reason)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(a, b, reason, depth + 1)
    elif isinstance(a, Permuted) and _undoes(a, b):
        _unify(a.inner, _back_in_order(b, a), reason, depth + 1)
    elif isinstance(b, Permuted) and _undoes(b, a):
        _unify(b.inner, _back_in_order(a, b), reason, depth + 1)
    elif not (isinstance(a, Concat) or isinstance(b, Concat)):
        _fix_both(a, b, reason)
    else:
        _unify_pieces(a, b, reason, depth + 1)


def _undoes(a: Permuted, b: Layout) -> bool:
    """Say whether what `a` permutes can be unified with `b` in the order that takes that back."""
    return isinstance(a.inner, Axis) or (isinstance(b, Permuted) and a.order == b.order)


def _back_in_order(layout: Layout, other: Permuted) -> Layout:
    """Return what stands in `layout` where the slots of `other.inner` stand in `other`."""
    return resolve(Permuted(layout, inverse_of(other.order)))


def inverse_of(order: Sequence[int]) -> tuple[int, ...]:
    """Return the order that takes another one back."""
    return tuple(int(position) for position in np.argsort(order))


def _fix_both(a: Layout, b: Layout, reason: Reason) -> None:
    fix(a, reason)
    fix(b, reason)


def _bind(axis: Axis, layout: Layout, reason: Reason) -> None:
    # An axis inside its own binding would never resolve: c = permuted c, or c = (c + d).
    if any(leaf is axis for leaf in leaves(layout)):
        fix(layout, replace(reason, why="to be kept like itself in another order"))
        return
    axis.bound = layout
    for mark in axis.renormalised:
        mark_renormalised(layout, mark)


def _unify_products(a: Product, b: Product, reason: Reason, depth: int) -> None:
    """Unify from the fastest-varying factor outwards; the larger of two is split by the smaller.

    (2 6) with (4 3):  6 = (2' 3'), and 3' goes with 3;  then (2 2') with 4 = (2" 2"'), and so on
    (2 6) with (3 4):  4 does not divide 6, so both stay whole
    """
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = left.pop(), right.pop()
        small = min(size_of(x), size_of(y))
        if not (can_split(x, small) and can_split(y, small)):
            _fix_both(Product((*left, x)), Product((*right, y)), reason)
            return
        (outer_x, inner_x), (outer_y, inner_y) = (split(z, small, reason) for z in (x, y))
        _unify(inner_x, inner_y, reason, depth)
        # What is left of a factor meets the next factor of the other side.
        left.extend([outer_x] if size_of(outer_x) > 1 else [])
        right.extend([outer_y] if size_of(outer_y) > 1 else [])


def _unify_pieces(a: Layout, b: Layout, reason: Reason, depth: int) -> None:
    """Cut both at the boundaries of either, (4 + 8) with (6 + 6) at 4 and 6, and unify piece by piece."""
    cuts = sorted({*_boundaries(a), *_boundaries(b)})
    if len(cuts) > MAX_PIECES:
        _fix_both(a, b, reason)
        return
    for x, y in zip(cut(a, cuts, reason), cut(b, cuts, reason), strict=True):
        _unify(x, y, reason, depth)


def _boundaries(layout: Layout) -> list[int]:
    parts = layout.parts if isinstance(layout, Concat) else ()
    return list(accumulate(map(size_of, parts)))[:-1]


def can_split(layout: Layout, inner: int) -> bool:
    """Say whether the layout can be seen as a product whose last factor has size `inner`."""
    layout = resolve(layout)
    if inner in (1, size_of(layout)):
        return True
    if isinstance(layout, Axis):
        return layout.size % inner == 0
    if isinstance(layout, Concat):
        return all(can_split(part, inner) for part in layout.parts)
    if isinstance(layout, Permuted):
        return False
    # Whole factors from the right while they fit; the first one that does not has to be split itself.
    for factor in reversed(layout.factors):
        size = size_of(factor)
        if inner % size:
            return can_split(factor, inner)
        inner //= size
    return inner == 1


def split(layout: Layout, inner: int, reason: Reason) -> tuple[Layout, Layout]:
    """Return `(outer, last)` whose product is the layout, with `last` of size `inner`.

    Axes on the way become products of two fresh axes, everywhere that they stand; the pieces of a
    concatenation come to share one last factor. Ask `can_split` first.

    >>> channels = Axis(12)
    >>> split(channels, 4, Reason("a reshape"))  # for a reshape to (3, 4)
    (3, 4)
    >>> resolve(channels)  # and so wherever else the axis stands
    (3 4)
    """
    layout = resolve(layout)
    if inner == 1:
        return layout, UNIT
    if inner == size_of(layout):
        return UNIT, layout
    if isinstance(layout, Axis):
        pieces = _fresh_like(layout, layout.size // inner), _fresh_like(layout, inner)
        _take_apart(layout, Product(pieces))
        return pieces
    if isinstance(layout, Permuted):
        raise AssertionError("can_split was asked first")
    if isinstance(layout, Concat):
        # (4 + 8) split by 2 is ((2 + 4) s): one s for all pieces, since it is one dimension after a reshape
        pairs = [split(part, inner, reason) for part in layout.parts]
        shared = pairs[0][1]
        for _, other in pairs[1:]:
            unify(shared, other, reason)
        return Concat(tuple(outer for outer, _ in pairs)), shared
    factors = list(layout.factors)
    taken: list[Layout] = []
    while inner > 1:
        factor = factors.pop()
        if inner % size_of(factor):
            outer, factor = split(factor, inner, reason)
            factors.append(outer)
        taken.insert(0, factor)
        inner //= size_of(factor)
    return resolve(Product(tuple(factors))), resolve(Product(tuple(taken)))


def _fresh_like(axis: Axis, size: int) -> Axis:
    fresh = Axis(size)
    fresh.fixed, fresh.renormalised = axis.fixed, axis.renormalised
    return fresh


def _take_apart(axis: Axis, pieces: Layout) -> None:
    _tie(axis, pieces, None)
    if axis.fixed is None:  # the pieces of a fixed axis are fixed too, and it need not know of them
        axis.bound = pieces


def cut(layout: Layout, positions: Sequence[int], reason: Reason) -> list[Layout]:
    """Return the consecutive pieces of a layout between the given increasing positions.

    Where slots that are in another order do not lie together in their own, they are fixed, for `reason`.

    >>> qkv = Axis(12)
    >>> cut(qkv, [4, 8], Reason("a chunk"))
    [4, 4, 4]
    >>> resolve(qkv)
    (4 + 4 + 4)
    """
    pieces: list[Layout] = []
    remainder, start = layout, 0
    for position in positions:
        piece, remainder = _cut_once(remainder, position - start, reason)
        pieces.append(piece)
        start = position
    return [resolve(piece) for piece in (*pieces, remainder)]


def _cut_once(layout: Layout, at: int, reason: Reason) -> tuple[Layout, Layout]:
    layout = resolve(layout)
    if at == 0:
        return EMPTY, layout
    if at == size_of(layout):
        return layout, EMPTY
    if isinstance(layout, Axis):
        head, tail = _fresh_like(layout, at), _fresh_like(layout, layout.size - at)
        _take_apart(layout, Concat((head, tail)))
        return head, tail
    if isinstance(layout, Concat):
        return _cut_concat(layout, at, reason)
    if isinstance(layout, Permuted):
        return _cut_permuted(layout, at, reason)
    return _cut_product(layout, at, reason)


def _cut_concat(layout: Concat, at: int, reason: Reason) -> tuple[Layout, Layout]:
    before: list[Layout] = []
    for index, part in enumerate(layout.parts):
        size = size_of(part)
        if at <= size:
            head, tail = _cut_once(part, at, reason)
            return Concat((*before, head)), Concat((tail, *layout.parts[index + 1 :]))
        before.append(part)
        at -= size
    raise AssertionError("the position lies inside the layout")


def _cut_product(layout: Product, at: int, reason: Reason) -> tuple[Layout, Layout]:
    """Cut between slots of the outer factor, or through one slot of it, which then stays whole.

    (3 4) at 8:  between two slots:  (2 4) and (1 4)
    (3 4) at 6:  through the second: (1 4) + 2  and  2 + (1 4), the inner 4 being 2 + 2 everywhere
    """
    outer, inner = layout.factors[0], Product(layout.factors[1:])
    slot, offset = divmod(at, size_of(inner))
    if offset == 0:
        head, tail = _cut_once(outer, slot, reason)
        return Product((head, inner)), Product((tail, inner))
    before, _, after = cut(outer, [slot, slot + 1], reason)
    head, tail = _cut_once(inner, offset, reason)
    return Concat((Product((before, inner)), head)), Concat((tail, Product((after, inner))))


def _cut_permuted(layout: Permuted, at: int, reason: Reason) -> tuple[Layout, Layout]:
    """Cut where the first positions are neighbours in their own order too; else all slots stay."""
    # d c | b a of a b c d: the head is c d, reversed; positions 0 2 1 3 cut at 2 have no such run
    first = min(layout.order[:at])
    if max(layout.order[:at]) - first != at - 1:
        why = replace(reason, why="taken apart in another order than its own")
        fix(layout, why)
        return Axis(at, why), Axis(len(layout.order) - at, why)
    before, head, after = cut(layout.inner, [first, first + at], reason)
    order = np.array(layout.order)
    order_of_tail = order[at:] - at * (order[at:] > first)  # what lay behind the head moves up
    tail = Permuted(Concat((before, after)), tuple(order_of_tail.tolist()))
    return Permuted(head, tuple((order[:at] - first).tolist())), tail


def describe(layout: Layout, names: Mapping[Axis, str] | None = None) -> str:
    """Return the layout in words: `(heads dim)`, `(a + b)`; a fixed axis shows as its size.

    >>> heads, dim = Axis(3), Axis(4)
    >>> describe(Concat((Product((heads, dim)), Axis(5))), {heads: "heads", dim: "dim"})
    '((heads dim) + 5)'
    """
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return (names or {}).get(layout, str(layout.size))
    if isinstance(layout, Product):
        return (
            f"({' '.join(describe(f, names) for f in layout.factors)})" if layout.factors else "1"
        )
    if isinstance(layout, Permuted):
        return f"permuted {describe(layout.inner, names)}"
    return f"({' + '.join(describe(part, names) for part in layout.parts)})"
