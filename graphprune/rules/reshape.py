"""What the dimensions of a reshape are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphprune.layout import (
    Axis,
    Layout,
    Product,
    Reason,
    can_split,
    fix,
    is_fixed,
    resolve,
    size_of,
    split,
    unify,
)


def regroup(dims: Sequence[Layout], sizes: Sequence[int], reason: Reason) -> list[Layout]:
    """Return the layouts of a reshape of dimensions `dims` to `sizes`, row-major.

    Where the new sizes cut through the old ones in a way that has no layout, the old ones are fixed
    and the new ones are born fixed.

    >>> batch, channels = Axis(2), Axis(12)
    >>> regroup([batch, channels], [2, 3, 4], Reason("a reshape"))
    [2, 3, 4]
    >>> resolve(channels)
    (3 4)
    """
    result: list[Layout] = []
    for old, new in _blocks([size_of(dim) for dim in dims], sizes):
        old_dims = [dims[i] for i in old]
        new_sizes = [sizes[i] for i in new]
        result.extend(_regroup_block(old_dims, new_sizes, reason))
    return result


def _regroup_block(dims: list[Layout], sizes: list[int], reason: Reason) -> list[Layout]:
    if len(dims) == 1 and len(sizes) == 1:
        return [dims[0]]
    remainder = resolve(Product(tuple(dims)))
    if 0 in sizes or is_fixed(remainder):
        fix(remainder, reason)
        fresh: list[Layout] = [Axis(size) for size in sizes]
        unify(Product(tuple(fresh)), remainder, reason)  # so that they say why they are fixed
        return fresh
    result: list[Layout] = []
    for size in reversed(sizes):
        if not can_split(remainder, size):
            fix(Product(tuple(dims)), reason)
            return [Axis(size, reason) for size in sizes]
        remainder, last = split(remainder, size, reason)
        result.insert(0, last)
    return result


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pair the fewest consecutive old and new dimensions that hold the same number of elements.

    >>> list(_blocks([2, 12, 5], [2, 3, 4, 5]))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    if 0 in old or 0 in new:
        yield list(range(len(old))), list(range(len(new)))
        return
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        size_old = size_new = 1
        if i < len(old):
            size_old, i = old[i], i + 1
        if j < len(new):
            size_new, j = new[j], j + 1
        while size_old != size_new:
            if size_old < size_new:
                size_old, i = size_old * old[i], i + 1
            else:
                size_new, j = size_new * new[j], j + 1
        yield list(range(first_i, i)), list(range(first_j, j))
