"""Rules as patterns: `b (g i) *s, (g o) i *k, (g o)? -> b (g o) *t` is a convolution.

Operands and results are separated by commas, dimensions by spaces. A name that stands in several
places is one layout. `(g i)` is a dimension made of two factors, `*s` any number of dimensions, `n?`
an operand that may be absent, and a number a dimension that is fixed. A starred name that stands on
one side only is an extent (a kernel window, a spatial size): it is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

from torch import Tensor

from graphprune.layout import Axis, Layout, Product, size_of
from graphprune.rules.registry import Call, Layouts, Operator, register


@dataclass(frozen=True)
class Operand:
    """The dimensions of one operand or result, each a tuple of factor names."""

    dims: tuple[tuple[str, ...], ...]
    star: str | None
    star_at: int

    @classmethod
    def parse(cls, text: str) -> Operand:
        """Return the operand written as `text`."""
        # `b (g i) *s` has the dimensions `(b)` and `(g, i)`, and the star `s` at 2.
        words = text.replace("?", "").replace("(", " ( ").replace(")", " ) ").split()
        dims: list[tuple[str, ...]] = []
        star, star_at = None, 0
        open_group: list[str] | None = None
        for word in words:
            if word == "(":
                open_group = []
            elif word == ")":
                dims.append(tuple(open_group or ()))
                open_group = None
            elif open_group is not None:
                open_group.append(word)
            elif word.startswith("*"):
                star, star_at = word[1:], len(dims)
            else:
                dims.append((word,))
        return cls(tuple(dims), star, star_at)

    def fits(self, rank: int) -> bool:
        """Say whether a tensor of that rank can be read so."""
        return rank == len(self.dims) or (self.star is not None and rank >= len(self.dims))

    def align(self, rank: int) -> list[tuple[str, ...] | None]:
        """Return the factor names of each of `rank` dimensions; None for those under the star."""
        starred = [None] * (rank - len(self.dims))
        return [*self.dims[: self.star_at], *starred, *self.dims[self.star_at :]]


@dataclass(frozen=True)
class Pattern:
    """A rule read from a pattern; call it with an operator call to get the results' layouts."""

    text: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern written as `operands -> results`."""
        left, right = text.split("->")
        sides = [tuple(map(Operand.parse, side.split(","))) for side in (left, right)]
        return cls(text, *sides)

    def __call__(self, call: Call) -> Sequence[Layouts]:
        """Unify what the pattern says is the same; return the layouts of the results."""
        # A tensor that is None (an absent bias) has its operand in the pattern, a number has none.
        operands = [
            call[argument.name]
            for argument in call.func._schema.arguments
            if str(argument.type) in _TENSOR_TYPES
        ]
        present = [tensor for tensor in operands if tensor is not None]
        if len(present) < len(call.tensors):  # some are in lists
            return self._fix_all(call)
        return self.apply(call, operands)

    def apply(
        self,
        call: Call,
        tensors: Sequence[Tensor | None],
        sizes: Mapping[str, int] | None = None,
    ) -> Sequence[Layouts]:
        """Do the same for operands that are given one by one, some names having known sizes."""
        if not self._describes(tensors, call.outputs):
            return self._fix_all(call)
        match = _Match(
            call,
            {operand.star for operand in self.operands if operand.star}
            & {result.star for result in self.results if result.star},
        )
        match.names.update({name: Axis(size) for name, size in (sizes or {}).items()})
        for operand, tensor in zip(self.operands, tensors, strict=False):
            if tensor is not None:
                match.read(operand, call.layouts_of(tensor))
        match.solve()
        return [
            match.write(result, list(output.shape))
            for result, output in zip(self.results, call.outputs, strict=False)
        ]

    def _describes(self, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> bool:
        """Say whether each tensor has an operand of its rank, and each output is of its result's."""
        operands = zip_longest(self.operands, tensors)
        return all(
            tensor is None or (operand is not None and operand.fits(tensor.dim()))
            for operand, tensor in operands
        ) and all(
            result.fits(output.dim()) for result, output in zip(self.results, outputs, strict=False)
        )

    def _fix_all(self, call: Call) -> Sequence[Layouts]:
        why = f"a call that the pattern {self.text!r} does not describe"
        for tensor in call.tensors:
            for layout in call.layouts_of(tensor):
                call.fix(layout, why)
        return [[call.fixed(size, why) for size in output.shape] for output in call.outputs]


_TENSOR_TYPES = ("Tensor", "Optional[Tensor]")


class _Match:
    """The layouts that names stand for in one call."""

    def __init__(self, call: Call, shared_stars: set[str]) -> None:
        self.call = call
        self.shared_stars = shared_stars
        self.names: dict[str, Layout] = {}
        self.stars: dict[str, Layouts] = {}
        self.composites: list[tuple[tuple[str, ...], Layout]] = []

    def read(self, operand: Operand, layouts: Layouts) -> None:
        starred: Layouts = []
        for names, layout in zip(operand.align(len(layouts)), layouts, strict=True):
            if names is None:
                starred.append(layout)
            elif len(names) > 1:
                self.composites.append((names, layout))
            elif names[0].isdigit():
                self.call.fix(layout, "a dimension of fixed meaning")
            else:
                self.bind(names[0], layout)
        if operand.star:
            self.read_star(operand.star, starred)

    def read_star(self, star: str, layouts: Layouts) -> None:
        if star not in self.shared_stars:
            for layout in layouts:
                self.call.fix(layout, "a window or extent")
            return
        for earlier_layout, layout in zip(
            self.stars.setdefault(star, layouts), layouts, strict=True
        ):
            self.call.unify(earlier_layout, layout)

    def bind(self, name: str, layout: Layout) -> None:
        self.call.unify(self.names.setdefault(name, layout), layout)

    def solve(self) -> None:
        """Name the factors of composite dimensions: at most one of each is unknown."""
        pending = self.composites
        while pending:
            # Of `(g i)` against 12 channels, `i` is 12 / g once `g` is known; a dimension with two
            # unknown factors waits for the others, and stays without names if none of them helps.
            solvable = [c for c in pending if sum(n not in self.names for n in c[0]) <= 1]
            for names, layout in solvable:
                known_size = prod(size_of(self.names[n]) for n in names if n in self.names)
                for name in names:
                    if name not in self.names:
                        self.names[name] = Axis(size_of(layout) // known_size)
                self.call.unify(Product(tuple(self.names[n] for n in names)), layout)
            pending = [c for c in pending if c not in solvable] if solvable else []

    def write(self, result: Operand, sizes: list[int]) -> Layouts:
        starred = iter(self.stars.get(result.star or "", ()))
        layouts: Layouts = []
        for names, size in zip(result.align(len(sizes)), sizes, strict=True):
            # A star of a result only (`*t`) has no layouts: positions that the operator makes.
            starred_layout = next(starred, None) if names is None else None
            layout: Layout
            if starred_layout is not None:
                layout = starred_layout
            elif names is not None and all(name in self.names for name in names):
                factors = tuple(self.names[name] for name in names)
                layout = factors[0] if len(factors) == 1 else Product(factors)
            elif names is None:
                layout = self.call.fixed(size, "positions that the operator makes")
            else:
                layout = self.call.fixed(size, "a dimension that the operator makes")
            layouts.append(layout)
        return layouts


def pattern(text: str, *operators: Operator) -> Pattern:
    """Register a pattern as the rule of `operators` and return it."""
    parsed = Pattern.parse(text)
    register(parsed, *operators)
    return parsed
