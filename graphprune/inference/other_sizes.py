"""Other sizes of the inputs: what holds at those of the example alone is no fact about the model.

A table of positions of which a run reads the first `x.shape[1]` rows looks, at one length, like two
sets of rows, read and unread. At another length the cut between them lies elsewhere. So a model is
analysed at a second set of sizes, and dimensions whose layouts differ keep all of their slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from graphprune.layout import (
    Axis,
    Layout,
    Permuted,
    Product,
    Reason,
    fix,
    is_fixed,
    resolve,
    size_of,
)
from graphprune.rules import Layouts
from graphprune.utils.inputs import Inputs

# Sizes that networks halve again and again are multiples of a power of two, at most this one.
_MOST_HALVINGS = 32

# Inputs with more elements than this are made smaller first, so that a second run costs little.
_MANY_ELEMENTS = 4096

Dim: TypeAlias = tuple[int, int]
"""The number of an input tensor, and of one of its dimensions."""


def propose_inputs(inputs: Inputs, tied_to_parameters: Container[Dim]) -> list[list[Inputs]]:
    """Return the inputs at other sizes: candidates for longer and for shorter ones.

    Each list begins with what differs most. A model may refuse any of them, and the first that it
    takes is the one to look at. Dimensions of one size are taken to be the same one and change together:
    a sequence and its mask stay as long as each other. The values are the example's, repeated, so that
    numbers of tokens stay numbers of tokens.

    Args:
        inputs: the example inputs.
        tied_to_parameters: dimensions that a parameter has too, as channels, so that none can change.

    """
    batch, lengths = _find_changeable_dims(inputs, tied_to_parameters)
    # A smaller batch costs less, but one of 1 would broadcast where the example's does not.
    new_batch = {dim: 2 if size > 4 else size + 1 for dim, size in batch.items()}
    is_small = sum(tensor.numel() for tensor in inputs.tensors()) <= _MANY_ELEMENTS
    resizes = (_lengthen, _shorten) if is_small else (_shorten,)
    by_direction = [list(_propose_sizes(new_batch, lengths, resize)) for resize in resizes]
    if batch:
        by_direction[0].append(new_batch)
    return [
        [_resize_inputs(inputs, sizes) for sizes in candidate_sizes]
        for candidate_sizes in by_direction
    ]


def all_lengths_vary(
    inputs: Inputs, resized_inputs: Sequence[Inputs], tied_to_parameters: Container[Dim]
) -> bool:
    """Say whether each length that could be another one is another one in some of the other inputs."""
    _, lengths = _find_changeable_dims(inputs, tied_to_parameters)
    return all(
        any(other.tensors()[number].shape[dim] != size for other in resized_inputs)
        for (number, dim), size in lengths.items()
    )


def _find_changeable_dims(
    inputs: Inputs, tied_to_parameters: Container[Dim]
) -> tuple[dict[Dim, int], dict[Dim, int]]:
    """Return the sizes of what most models have as the batch, and of other dimensions that can change."""
    tensors = inputs.tensors()
    free_dims = {
        (number, dim): size
        for number, tensor in enumerate(tensors)
        for dim, size in enumerate(tensor.shape)
        if (number, dim) not in tied_to_parameters
    }
    # The first dimension of the first input, and of others that agree with it.
    batch = {d: size for d, size in free_dims.items() if d[1] == 0 and size == tensors[0].shape[0]}
    return batch, {d: size for d, size in free_dims.items() if d not in batch and size > 1}


def _propose_sizes(
    batch: dict[Dim, int], lengths: dict[Dim, int], resize: Callable[[int], int]
) -> Iterator[dict[Dim, int]]:
    """Yield new sizes: of all lengths, then of those of one size alone, each with the batch and without."""
    sizes = sorted(set(lengths.values()))
    # For lengths 7, 7 and 12: all of them, then both sevens alone, then the twelve alone.
    size_choices = [sizes] + ([[size] for size in sizes] if len(sizes) > 1 else [])
    for chosen_sizes in size_choices if sizes else ():
        resized_lengths = {
            dim: resize(size) for dim, size in lengths.items() if size in chosen_sizes
        }
        yield resized_lengths | batch
        if batch:
            yield resized_lengths


def _lengthen(size: int) -> int:
    return size + math.gcd(size, _MOST_HALVINGS)


def _shorten(size: int) -> int:
    # The power of two stays: 24 = 3 * 8 becomes 8, 224 = 7 * 32 becomes 3 * 32 = 96.
    step = math.gcd(size, _MOST_HALVINGS)
    half = step * max(1, size // (2 * step))
    return half if half < size else max(1, size // 2)


def _resize_inputs(inputs: Inputs, sizes: Mapping[Dim, int]) -> Inputs:
    """Return the inputs with some dimensions of other sizes, their slots left out or repeated."""
    # `map` meets the tensors in the order of `tensors()`, so counting tells which one it is.
    numbers = iter(range(len(inputs.tensors())))

    def resize(tensor: Tensor) -> Tensor:
        number = next(numbers)
        for dim, size in enumerate(tensor.shape):
            new_size = sizes.get((number, dim), size)
            if new_size != size:
                slots = torch.arange(new_size, device=tensor.device) % size
                tensor = tensor.index_select(dim, slots)
        return tensor

    return inputs.map(resize)


def reconcile(
    first_run: Mapping[str, Layouts],
    other_runs: Sequence[Mapping[str, Layouts]],
    reason_for: Callable[[str, int], Reason],
) -> list[dict[Axis, Axis]]:
    """Fix, in all, what analyses of a model see in different ways; pair the axes that are left.

    Args:
        first_run: layouts of the model's tensors by name.
        other_runs: those of the same tensors (or of some), each found at other sizes of the inputs.
        reason_for: why a dimension of a tensor keeps all of its slots.

    Returns:
        For each of the other runs, by each free axis of the first, the axis that it is there.

    """
    # A fixed axis changes other layouts in which it
    # stands, so all are compared anew until none differs.
    while True:
        pairings = [_Pairing() for _ in other_runs]
        unlike_dims = [
            (name, dim)
            for other_run, pairing in zip(other_runs, pairings, strict=True)
            for name, layouts in other_run.items()
            for dim, layout in enumerate(layouts)
            if not pairing.fits(_outline(first_run[name][dim]), _outline(layout))
        ]
        if not unlike_dims:
            return [pairing.partners for pairing in pairings]
        for name, dim in unlike_dims:
            reason = reason_for(name, dim)
            for layouts_by_name in (first_run, *other_runs):
                if name in layouts_by_name:
                    fix(layouts_by_name[name][dim], reason)


_Outline: TypeAlias = "Axis | int | tuple[str, tuple[_Outline, ...]]"
"""A layout in which what is fixed is a number of slots: where else it is cut does not matter."""


def _outline(layout: Layout) -> _Outline:
    layout = resolve(layout)
    if is_fixed(layout):
        return size_of(layout)
    if isinstance(layout, Axis):
        return layout
    if isinstance(layout, Product):
        return "product", tuple(map(_outline, layout.factors))
    if isinstance(layout, Permuted):
        return f"permuted by {layout.order}", (_outline(layout.inner),)
    return "concat", tuple(_merge_fixed_parts(map(_outline, layout.parts)))


def _merge_fixed_parts(parts: Iterator[_Outline]) -> Iterator[_Outline]:
    """Yield the parts of a concatenation, neighbours that are fixed as one."""
    fixed_size = 0
    for part in parts:
        if isinstance(part, int):
            fixed_size += part
            continue
        if fixed_size:
            yield fixed_size
        fixed_size = 0
        yield part
    if fixed_size:
        yield fixed_size


class _Pairing:
    """Which free axis of one analysis is which of another: one to one."""

    def __init__(self) -> None:
        self.partners: dict[Axis, Axis] = {}
        self.originals: dict[Axis, Axis] = {}

    def fits(self, a: _Outline, b: _Outline) -> bool:
        """Say whether two layouts are the same once their axes are paired, and pair these."""
        if isinstance(a, Axis) and isinstance(b, Axis):
            # One to one: neither axis may have been paired with a third one.
            are_partners = (
                self.partners.setdefault(a, b) is b and self.originals.setdefault(b, a) is a
            )
            return are_partners and a.size == b.size
        if isinstance(a, tuple) and isinstance(b, tuple):
            are_alike = a[0] == b[0] and len(a[1]) == len(b[1])
            return are_alike and all(self.fits(x, y) for x, y in zip(a[1], b[1], strict=True))
        return isinstance(a, int) and isinstance(b, int) and a == b
