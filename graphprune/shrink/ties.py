"""Which of the numbers that modules hold are sizes of what was cut, and what they are now.

A number that equals a size may be tied to it or equal it by chance. What tells, the strongest first:

1. In instances of the class that hold different numbers, each is the size of the same dimension there.
2. A text beside the number names a submodule: it is a size of what comes out of that.
3. The code of the class hands the number to what makes a dimension of that size.
4. Its name is one of a size (`out_channels`, `num_heads`) or of something else (`kernel_size`, `depth`).
5. The module's own code gives it to operators as a size of their results.

Where all dimensions that it may be have one size now, it is that size; where they have several, it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from graphprune.inference.recorded import Inference
from graphprune.layout import Axis, size_of
from graphprune.shrink.constructors import Constructors
from graphprune.shrink.dimensions import Dimension, Dimensions, Pieces, cut_sizes
from graphprune.shrink.held_numbers import (
    HeldNumber,
    find_held_numbers,
    group_by_class_and_keys,
    says_side,
    says_size,
)

aten = torch.ops.aten
_BY_NUMBER = (aten.mul, aten.div, aten.mul_, aten.div_)
_LEAST = 1e-18  # of factors that may be made of a size


@dataclass(frozen=True)
class AmbiguousSize:
    """A number that equals sizes which differ now, so that it was left as it was.

    Attributes:
        name: of the attribute, with the path of its module.
        value: the number.
        sizes: what the dimensions of this size have become.

    """

    name: str
    value: int
    sizes: tuple[int, ...]

    @property
    def is_of_nothing(self) -> bool:
        """Whether no dimension has the size any more."""
        return self.value not in self.sizes

    def __str__(self) -> str:
        return f"{self.name} = {self.value}: {' or '.join(map(str, self.sizes))} now"


@dataclass(frozen=True)
class Ties:
    """The numbers that follow, with their sizes now, and those that may be several sizes."""

    sizes: Mapping[HeldNumber, int]
    ambiguous: Mapping[HeldNumber, tuple[int, ...]]


def infer_ties(
    model: nn.Module,
    inference: Inference,
    kept: Mapping[Axis, int],
    described: tuple[type, ...],
    *,
    compared: bool,
) -> Ties:
    """Tell which numbers are sizes of what was cut.

    Args:
        model: the slim model, its own numbers still those of the original.
        inference: the layouts of the original's tensors.
        kept: how many slots of each cut axis are left.
        described: classes of torch whose own attributes are true already.
        compared: whether the model's values are compared once they follow. Else numbers that forward
            may compute with, rather than go by as sizes, are left.

    """
    judge = _Judge(model, inference, kept, described)
    if not compared:
        judge.computed_with = _numbers_computed_with(inference)
    return judge.ties()


class _Judge:
    def __init__(
        self,
        model: nn.Module,
        inference: Inference,
        kept: Mapping[Axis, int],
        described: tuple[type, ...],
    ) -> None:
        self.pieces = Pieces(inference, kept)
        shrinking_sizes = cut_sizes(inference, self.pieces)
        by_class_and_keys = group_by_class_and_keys(list(find_held_numbers(model, described)))
        self.places = [
            instances
            for instances in by_class_and_keys.values()
            if any(held_number.value in shrinking_sizes for held_number in instances)
        ]
        self.modules = dict(model.named_modules())
        sizes: dict[str, set[int]] = {}
        for numbers in self.places:
            for number in numbers:
                for path in (number.module, *self._find_modules_beside(number)):
                    sizes.setdefault(path, set()).add(number.value)
        self.dimensions = Dimensions(inference, self.pieces, sizes)
        self.constructors = Constructors(model, inference, self.pieces)
        self.computed_with: set[tuple[str, int]] = set()

    def ties(self) -> Ties:
        sizes: dict[HeldNumber, int] = {}
        ambiguous: dict[HeldNumber, tuple[int, ...]] = {}
        for numbers in self.places:
            common = self._common_addresses(numbers)
            for number in numbers:
                kept_sizes = self._infer_kept_sizes(number, common)
                if len(kept_sizes) > 1:
                    ambiguous[number] = tuple(kept_sizes)
                elif kept_sizes and kept_sizes[0] != number.value:
                    sizes[number] = kept_sizes[0]
        return Ties(sizes, ambiguous)

    def _common_addresses(self, numbers: Sequence[HeldNumber]) -> set[object]:
        """Return where each of the instances that hold different numbers has a dimension of its size."""
        if len({number.value for number in numbers}) < 2:
            return set()
        # One block holds 32, and conv.weight has 32 rows there; another holds 64, and has 64 rows:
        # that each has a dimension of its number at the same address is no coincidence.
        addresses = [
            {dimension.address for dimension in self._dimensions(number)} for number in numbers
        ]
        return set.intersection(*addresses)  # type: ignore[arg-type]

    def _dimensions(self, number: HeldNumber) -> list[Dimension]:
        return self.dimensions.of(number.module, number.value)

    def _infer_kept_sizes(self, number: HeldNumber, common: set[object]) -> list[int]:
        """Return what the number may be now, one size where it is told; nothing where it is no size."""
        if (number.module, number.value) in self.computed_with:
            return []
        dimensions = self._dimensions(number)
        if not self._is_cut(dimensions):
            return []
        is_size = says_size(number)
        evident = False
        agreeing = [dimension for dimension in dimensions if dimension.address in common]
        beside = list(self._dimensions_beside(number)) if is_size is not False else []
        for chosen in (beside, agreeing):  # the strongest last
            if chosen:
                dimensions, evident = chosen, True
        if is_size:
            dimensions = [dimension for dimension in dimensions if dimension.of_weights]
        kept_sizes = self._kept_sizes(dimensions)
        if len(kept_sizes) <= 1 and (evident or is_size):
            return kept_sizes
        return self._infer_by_code(number, dimensions, is_size=evident or is_size is True)

    def _infer_by_code(
        self, number: HeldNumber, dimensions: Sequence[Dimension], *, is_size: bool
    ) -> list[int]:
        """Go by the code of the class, then by what else tells dimensions apart.

        Args:
            number: the number.
            dimensions: what it may be the size of.
            is_size: whether something says that it is a size at all.

        """
        built_sizes = {self.pieces.left(layout) for layout in self.constructors.layouts_of(number)}
        if len(built_sizes) == 1:
            return list(built_sizes)
        if not is_size and not built_sizes:
            return (
                self._kept_sizes([x for x in dimensions if x.asked])
                if self._is_asked(dimensions)
                else []
            )
        side = says_side(number)
        # The name says a side (`in_channels`): what goes in there, of weights if there is such.
        at_border = [x for x in self._dimensions(number) if side and x.side == side]
        at_border = [x for x in at_border if x.of_weights] or at_border
        asked_dimensions = [x for x in dimensions if x.asked]
        for chosen in (at_border, asked_dimensions):
            kept_sizes = self._kept_sizes(chosen)
            if len(kept_sizes) == 1:
                return kept_sizes
        return sorted(built_sizes) or self._kept_sizes(dimensions)

    def _is_asked(self, dimensions: Sequence[Dimension]) -> bool:
        asked_dimensions = [x for x in dimensions if x.asked]
        return (
            len(self._kept_sizes(asked_dimensions)) == 1 and len(self._kept_sizes(dimensions)) == 1
        )

    def _find_modules_beside(self, number: HeldNumber) -> Iterator[str]:
        """Yield the submodules that texts beside the number name."""
        for text in number.texts:
            path = f"{number.module}.{text}".removeprefix(".")
            if text and path in self.modules:
                yield path

    def _dimensions_beside(self, number: HeldNumber) -> Iterator[Dimension]:
        side = "in" if "forward_pre" in number.texts else "out"
        for path in self._find_modules_beside(number):
            for dimension in self.dimensions.of(path, number.value):
                if dimension.side == side:
                    yield dimension

    def _is_cut(self, dimensions: Sequence[Dimension]) -> bool:
        return any(self.pieces.left(x.layout) != size_of(x.layout) for x in dimensions)

    def _kept_sizes(self, dimensions: Sequence[Dimension]) -> list[int]:
        return sorted({self.pieces.left(x.layout) for x in dimensions})


def _numbers_computed_with(inference: Inference) -> set[tuple[str, int]]:
    """Return, with the module, the numbers that tensors are multiplied or divided by, or their roots.

    Such a number has to keep its value, whatever size it equals.
    """
    numbers: set[tuple[str, int]] = set()
    for step in inference.steps:
        if step.func.overloadpacket in _BY_NUMBER:
            for value in step.arguments.values():
                # Not what stands for infinity (torch.finfo(...).min), whose square overflows; nor NaN.
                if isinstance(value, (int, float)) and _LEAST < abs(value) < 1 / _LEAST:
                    numbers.update(
                        (step.place.module, number) for number in _find_integers_behind(abs(value))
                    )
    return numbers


def _find_integers_behind(factor: float) -> Iterator[int]:
    """Yield the whole numbers that a factor is, or the inverse or a root of."""
    # Attention scores times 0.125, which is 1 / sqrt(64): 64 has to stay where it is held.
    for number in (factor, 1 / factor, factor**2, factor**-2):
        if 1.5 < number < 1e9 and math.isclose(number, round(number), rel_tol=1e-6):
            yield round(number)
