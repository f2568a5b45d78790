"""The sizes that modules hold made to follow a cut: those that are told, and those that forward needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from torch import nn
from torch.utils import _pytree as pytree

from graphprune.errors import VerificationError
from graphprune.inference.recorded import Inference, Step
from graphprune.layout import Axis, Layout, free_axes, resolve, size_of
from graphprune.masks import kept_size
from graphprune.shrink.held_numbers import HeldNumber, find_held_numbers, is_of_torch, put_number
from graphprune.shrink.module_attributes import DESCRIBED_CLASSES

# Ways of following that are tried at most; each is a run without data.
_WAYS = 32


def put_sizes(model: nn.Module, sizes: Mapping[HeldNumber, int]) -> None:
    """Let the model hold these numbers."""
    for number, size in sizes.items():
        put_number(model, number, size)


def keep_what_works(
    model: nn.Module, sizes: Mapping[HeldNumber, int], works: Callable[[], bool]
) -> set[HeldNumber]:
    """Let the model hold these numbers, except those that it does not work with, which are returned.

    Args:
        model: a model that works with the numbers that it holds.
        sizes: what the numbers are to be.
        works: whether the model works as it is now.

    """
    if not sizes:
        return set()
    put_sizes(model, sizes)
    if works():
        return set()
    put_sizes(model, {number: number.value for number in sizes})
    names = sorted({number.keys for number in sizes}, key=str)
    # Numbers of one name go together, whatever modules hold them.
    if len(names) == 1:
        return set(sizes)
    refused: set[HeldNumber] = set()
    # The second half is tried beside what worked of the first.
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        half_of_sizes = {number: size for number, size in sizes.items() if number.keys in half}
        refused |= keep_what_works(model, half_of_sizes, works)
    return refused


def try_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> Iterator[dict[HeldNumber, int]]:
    """Change the whole numbers that a module's own operators go by, and yield what they are now.

    `self.num_heads` is one where the module's code reshapes to it: it takes the size that the dimension
    has now. Where its value stood for several, one after the other is tried, alike in modules that are
    alike. A value may be equal to a size by accident, so leaving it is tried as well; and a number that
    is only the size of something there (`self.width // self.num_heads`) is left as long as that works.
    The model has to be verified after each change.

    Args:
        model: a slim model, in the code of its own class; it is changed before each yield.
        inference: the operators of the original.
        kept: how many slots of each cut axis are left.

    """
    by_choice = _group_by_choice(model, inference, kept)
    choices = [choice for _, _, choice in by_choice]
    for picks in islice(_yield_nearest_first(choices), _WAYS if by_choice else 0):
        sizes = {
            number: size
            for numbers, size in zip(by_choice.values(), picks, strict=True)
            for number in numbers
        }
        put_sizes(model, sizes)
        yield sizes


def _yield_nearest_first(choices: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Yield picks of one from each of the choices, first those that take the first of most."""
    # [a, b] and [c, d] give ac; then, one step away, ad, bc; then bd.
    for rank in range(sum(len(choice) - 1 for choice in choices) + 1):
        yield from _yield_of_rank(choices, rank)


def _yield_of_rank(choices: Sequence[Sequence[int]], rank: int) -> Iterator[tuple[int, ...]]:
    """Yield the picks whose positions in the choices add up to the rank."""
    if not choices:
        yield from [()] if rank == 0 else []
        return
    for position, picked in enumerate(choices[0][: rank + 1]):
        for later_picks in _yield_of_rank(choices[1:], rank - position):
            yield (picked, *later_picks)


def _group_by_choice(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> dict[tuple[type, tuple[str | int, ...], tuple[int, ...]], list[HeldNumber]]:
    """Return numbers by class, keys, and what they may be now, the likeliest first."""
    from_arguments: dict[tuple[str, int], set[int]] = {}
    from_tensors: dict[tuple[str, int], set[int]] = {}
    for step in inference.steps:
        layouts = [layout for value in (*step.inputs, *step.outputs) for layout in value.layouts]
        for sizes, dims in (
            (from_arguments, _find_argument_dimensions(step)),
            (from_tensors, layouts),
        ):
            for layout in dims:
                # By module and size before, the sizes now: {("layer1", 64): {32, 48}}.
                key = step.place.module, size_of(layout)
                sizes.setdefault(key, set()).add(kept_size(layout, kept))
    by_choice: dict[tuple[type, tuple[str | int, ...], tuple[int, ...]], list[HeldNumber]] = {}
    for number in find_held_numbers(model, DESCRIBED_CLASSES):
        likely = from_arguments.get((number.module, number.value), set()) - {number.value}
        possible = from_tensors.get((number.module, number.value), set()) - {
            number.value,
            *likely,
        }
        if likely or possible:
            # First what operators were told, then to stay, then what only stands in the module.
            choice = (*sorted(likely), number.value, *sorted(possible))
            by_choice.setdefault((number.kind, number.keys, choice), []).append(number)
    return by_choice


def axes_given_as_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int], *, of_attention: bool
) -> set[Axis]:
    """Return the cut axes in dimensions whose size, or order, an operator in code of one's own was given.

    With `of_attention` those that nn.MultiheadAttention was given count too: it holds its number of heads.
    """
    paths = {
        path
        for path, module in model.named_modules()
        if not is_of_torch(type(module))
        or (of_attention and isinstance(module, nn.MultiheadAttention))
    }
    axes: set[Axis] = set()
    for step in inference.steps:
        if step.place.module in paths:
            for layout in (*_find_argument_dimensions(step), *_find_ordered_by_code(step)):
                axes.update(axis for axis in free_axes(layout) if axis in kept)
    return axes


def _find_ordered_by_code(step: Step) -> Iterator[Layout]:
    """Yield the dimension of a step's result whose slots come in an order that stands in code."""
    if step.addresses and any(value.numbers and not value.numbers.name for value in step.inputs):
        for before, after in zip(step.inputs[0].layouts, step.outputs[0].layouts, strict=True):
            # The dimension that was put in order is the one that came out with another layout.
            if resolve(before) != resolve(after):
                yield after


def _find_argument_dimensions(step: Step) -> Iterator[Layout]:
    """Yield the dimensions of a step's results whose sizes are among its arguments."""
    argument_numbers = {leaf for leaf in pytree.tree_leaves(step.arguments) if type(leaf) is int}
    for value in step.outputs:
        for layout in value.layouts:
            if size_of(layout) in argument_numbers:
                yield layout


def as_predicate(check: Callable[[], object]) -> Callable[[], bool]:
    """Return whether a check passes, as a function."""

    def works() -> bool:
        try:
            check()
        except VerificationError:
            return False
        return True

    return works
