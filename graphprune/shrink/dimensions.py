"""Where sizes show: the dimensions of the tensors in and around each module, and parts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import Axis, Concat, Layout, Product, leaves, resolve, size_of, why_fixed
from graphprune.masks import kept_size


@dataclass(frozen=True)
class Dimension:
    """A dimension of a tensor in or at the border of a module, or a part of one.

    Attributes:
        address: where it is, in words that mean the same in other instances of the module's class.
        layout: what it is made of.
        side: "in" or "out" for what goes into the module or comes out of it, else "".
        of_weights: whether the model's parameters have it, other than as a window.
        asked: whether the module's own code gave its size to an operator.

    """

    address: tuple[Any, ...]
    layout: Layout
    side: str
    of_weights: bool
    asked: bool


class Pieces:
    """Dimensions taken apart: whole, factor by factor and part by part, with the sizes before and after."""

    def __init__(self, inference: Inference, kept: Mapping[Axis, int]) -> None:
        self.kept = kept
        self.of_layout: dict[int, list[tuple[int, Layout]]] = {}
        self.alive: list[Layout] = []  # so that no id is given twice
        self.weights = {
            axis
            for name in inference.parameters
            for layout in inference.parameters[name]
            for axis in leaves(layout)
            if not _is_window(axis)
        }

    def of(self, layout: Layout) -> list[tuple[int, Layout]]:
        """Return the sizes and layouts of a dimension and its parts."""
        # By identity: the same one comes again for every module around its tensor.
        pieces = self.of_layout.get(id(layout))
        if pieces is None:
            self.alive.append(layout)
            pieces = [(size_of(part), part) for part in _parts(resolve(layout))]
            self.of_layout[id(layout)] = pieces
        return pieces

    def left(self, layout: Layout) -> int:
        """Return the size that is left of a layout."""
        return kept_size(layout, self.kept)

    def is_of_weights(self, layout: Layout) -> bool:
        """Say whether any axis of the layout is in the model's tensors, other than as a window."""
        return any(axis in self.weights for axis in leaves(layout))


def _is_window(axis: Axis) -> bool:
    reason = why_fixed(axis)
    return reason is not None and "window" in reason.why


def _parts(layout: Layout) -> Iterator[Layout]:
    """Yield a resolved layout, runs of its factors, and its parts."""
    yield layout
    if isinstance(layout, Product):
        factors = layout.factors
        for start in range(len(factors)):
            # Of (a b c) also a, (a b), b, (b c) and c.
            for end in range(start + 1, len(factors) + 1):
                if end - start == 1:
                    yield from _parts(factors[start])
                elif end - start < len(factors):
                    yield Product(factors[start:end])
    elif isinstance(layout, Concat):
        for part in layout.parts[:16]:
            yield from _parts(part)


def cut_sizes(inference: Inference, pieces: Pieces) -> set[int]:
    """Return the sizes of all dimensions, and parts of them, that get smaller."""
    layouts = [layout for dims in inference.parameters.values() for layout in dims]
    layouts += [
        layout for step in inference.steps for value in step.outputs for layout in value.layouts
    ]
    return {
        size for layout in layouts for size, part in pieces.of(layout) if pieces.left(part) != size
    }


class Dimensions:
    """The dimensions in and around modules whose sizes are looked for."""

    def __init__(self, inference: Inference, pieces: Pieces, sizes: Mapping[str, set[int]]) -> None:
        """Look for sizes by module path."""
        self.pieces = pieces
        self.sizes = sizes
        self.around: dict[str, list[str]] = {}
        self.by_module: dict[str, dict[int, dict[tuple[Any, ...], Dimension]]] = {
            path: {} for path in sizes
        }
        for name, layouts in inference.parameters.items():
            owner, _, attribute = name.rpartition(".")
            for path in self._find_modules_around(owner):
                self._add(path, (_relative_path(owner, path), attribute), layouts)
        counts: dict[tuple[str, str], int] = {}
        for step in inference.steps:
            call = (step.place.module, step.place.operator)
            counts[call] = counts.get(call, 0) + 1
            self._add_step(step, (*call, counts[call]))
        self._add_borders(inference)

    def of(self, path: str, size: int) -> list[Dimension]:
        """Return the dimensions and parts of this size in and around a module."""
        return list(self.by_module.get(path, {}).get(size, {}).values())

    def _find_modules_around(self, owner: str) -> list[str]:
        """Return the modules looked at that a module is in, itself included."""
        if owner not in self.around:
            # For "a.b.c": "", "a", "a.b" and "a.b.c".
            ends = [end for end, sign in enumerate(owner + ".") if sign == "."]
            paths = dict.fromkeys(["", *(owner[:end] for end in ends)])
            self.around[owner] = [path for path in paths if path in self.sizes]
        return self.around[owner]

    def _add_step(self, step: Step, call: tuple[str, str, int]) -> None:
        owner, operator, count = call
        paths = self._find_modules_around(owner)
        if not paths:
            return
        argument_sizes = {leaf for leaf in pytree.tree_leaves(step.arguments) if type(leaf) is int}
        for number, value in enumerate((*step.inputs, *step.outputs)):
            is_output = number >= len(step.inputs)
            for path in paths:
                address = (_relative_path(owner, path), operator, count, number)
                # Views and the like are told the sizes of their results, never of their operands.
                given_sizes = argument_sizes if is_output and path == owner else set()
                self._add(path, address, value.layouts, given_sizes=given_sizes)

    def _add_borders(self, inference: Inference) -> None:
        """Add what goes into modules and comes out of them."""
        owners = [step.place.module for step in inference.steps]
        last_numbers: dict[tuple[str, str], int] = {}
        added: set[tuple[str, str, int | str]] = set()

        def add(paths: Iterable[str], side: str, value: Value) -> None:
            for path in paths:
                if (path, side, value.source) not in added:
                    added.add((path, side, value.source))
                    last_numbers[path, side] = last_numbers.get((path, side), -1) + 1
                    self._add(path, (side, last_numbers[path, side]), value.layouts, side=side)

        for step in inference.steps:
            around_reader = set(self._find_modules_around(step.place.module))
            for value in step.inputs:
                if isinstance(value.source, int):
                    # It leaves the maker's modules that the reader is not in, and enters the others.
                    around_maker = set(self._find_modules_around(owners[value.source]))
                    add(around_maker - around_reader, "out", value)
                    add(around_reader - around_maker, "in", value)
                elif value.source in inference.inputs:
                    add(around_reader, "in", value)
        for name, layouts in inference.outputs.items():
            output_source = inference.output_sources[name]
            if isinstance(output_source, int):
                add(
                    set(self._find_modules_around(owners[output_source])),
                    "out",
                    Value(layouts, output_source),
                )

    def _add(
        self,
        path: str,
        address: tuple[Any, ...],
        layouts: Iterable[Layout],
        *,
        side: str = "",
        given_sizes: Iterable[int] = (),
    ) -> None:
        sizes, dimensions_by_size = self.sizes[path], self.by_module[path]
        for dim, layout in enumerate(layouts):
            for number, (size, part) in enumerate(self.pieces.of(layout)):
                if size in sizes:
                    key = (*address, dim, number)
                    dimensions_by_size.setdefault(size, {})[key] = Dimension(
                        key, part, side, self.pieces.is_of_weights(part), size in given_sizes
                    )


def _relative_path(owner: str, path: str) -> str:
    return owner[len(path) :].lstrip(".")
