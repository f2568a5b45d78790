"""Why a dimension of a parameter stays, or what it goes with: chains of operators from here to there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from graphprune.inference.recorded import Inference
from graphprune.layout import (
    Axis,
    Layout,
    Reason,
    axes_as_written,
    describe,
    free_axes,
    leaves,
    size_of,
)

# More ties than this are counted, not printed.
MAX_PRINTED = 24


@dataclass(frozen=True)
class Link:
    """A tie that operators made between two dimensions.

    Attributes:
        start: the dimension nearer to the one that is explained, as `parameter:dim`.
        end: the one farther off; where it is no parameter's, the operator that gave it.
        by: the operators that tie the two, in order, with module paths and source lines.

    """

    start: str
    end: str
    by: tuple[Reason, ...]

    def __str__(self) -> str:
        return f"{self.end} is tied to {self.start} by {', then '.join(map(_format_operator, self.by))}"


@dataclass(frozen=True)
class ExplainedPart:
    """Slots of a dimension that share their fate.

    Attributes:
        group: name of the group that they can be removed with, or "".
        fixed: why none of them can be removed, or None.
        links: for a group, what ties each other member to it; for what is fixed, the chain from the
            dimension to the operator that fixes it.

    """

    group: str
    fixed: Reason | None
    links: tuple[Link, ...]

    def __str__(self) -> str:
        head = f"group {self.group}" if self.fixed is None else "fixed"
        lines = [f"  {head}", *(f"    {link}" for link in self.links[:MAX_PRINTED])]
        if len(self.links) > MAX_PRINTED:
            lines.append(f"    and {len(self.links) - MAX_PRINTED} more")
        return "\n".join(lines if self.fixed is None else [*lines, f"    {self.fixed}"])


@dataclass(frozen=True)
class Explanation:
    """What is known of one dimension of a parameter; `print` it.

    Attributes:
        name: the dimension, as `parameter:dim`.
        size: its number of slots.
        layout: what it is made of, in words.
        parts: the groups and the fixed slots in it.

    """

    name: str
    size: int
    layout: str
    parts: tuple[ExplainedPart, ...]

    def __str__(self) -> str:
        lines = [f"{self.name} has {self.size} slots: {self.layout}", *map(str, self.parts)]
        return "\n".join(lines if self.parts else [*lines, "  nothing to cut: one slot"])

    def as_dict(self) -> dict[str, Any]:
        """Return the same in plain types."""
        return {
            "name": self.name,
            "size": self.size,
            "layout": self.layout,
            "parts": [
                {
                    "group": part.group,
                    "fixed": str(part.fixed or ""),
                    "links": [
                        {"from": link.start, "to": link.end, "by": list(map(str, link.by))}
                        for link in part.links
                    ],
                }
                for part in self.parts
            ],
        }


class Explainer:
    """Follows ties through the layouts of an inference.

    Attributes:
        names: the parameter dimensions that an axis was declared for, as `parameter:dim`.

    """

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.names: dict[Axis, str] = {}
        for parameter, layouts in inference.parameters.items():
            for dim, layout in enumerate(layouts):
                for axis in axes_as_written(layout):
                    self.names.setdefault(axis, f"{parameter}:{dim}")

    def explain(self, parameter: str, dim: int, groups: dict[Axis, str]) -> Explanation:
        """Return the explanation of a dimension.

        Args:
            parameter: its name in the inference.
            dim: which of its dimensions, from 0.
            groups: the name of each axis that can be cut.

        """
        layout = self.inference.parameters[parameter][dim]
        start = f"{parameter}:{dim}"
        parts = [
            ExplainedPart(groups[axis], None, tuple(self._ties(layout, axis, start)))
            for axis in free_axes(layout)
        ]
        reasons = dict.fromkeys(axis.fixed for axis in leaves(layout) if axis.fixed is not None)
        parts += [
            ExplainedPart("", reason, tuple(self._links_to_cause(layout, reason, start)))
            for reason in reasons
        ]
        return Explanation(start, size_of(layout), describe(layout, groups), tuple(parts))

    def _ties(self, layout: Layout, axis: Axis, start: str) -> Iterator[Link]:
        """Yield a link to every other parameter dimension that has a part in the axis."""
        search = _Search(layout, lambda leaf: leaf is axis)
        linked_names = {start}
        for reached_axis in search.came_from:
            name = self.names.get(reached_axis, start)
            if name not in linked_names:
                linked_names.add(name)
                # of the chain from the start to it the last link; the others lead to other names
                yield self._links(search, reached_axis, start)[-1]

    def _links_to_cause(self, layout: Layout, reason: Reason, start: str) -> list[Link]:
        """Return the links to the axis for which the reason was given."""
        search = _Search(layout, lambda leaf: leaf.fixed == reason)
        ends = (axis for axis in search.came_from if axis.fixed_here and axis.fixed == reason)
        return self._links(search, next(ends), start)

    def _links(self, search: _Search, goal: Axis, start: str) -> list[Link]:
        """Return the way to an axis, a link from each parameter dimension on it to the next."""
        links: list[Link] = []
        operators: list[Reason] = []
        link_start, last_axis = start, goal
        for axis, tie in search.way_to(goal):
            # axes of no parameter have no name: the ties on both sides of one make one link
            if tie is not None and tie not in operators:
                operators.append(tie)
            name = self.names.get(axis, "")
            if operators and name not in ("", link_start):
                links.append(Link(link_start, name, tuple(operators)))
                link_start, operators = name, []
            last_axis = axis
        if operators:
            links.append(Link(link_start, self._maker_of(last_axis), tuple(operators)))
        return links

    def _maker_of(self, axis: Axis) -> str:
        """Return in words the value that an axis first stood in."""
        for name, layouts in self.inference.inputs.items():
            if any(
                axis is declared_axis
                for layout in layouts
                for declared_axis in axes_as_written(layout)
            ):
                return name
        for step in self.inference.steps:
            for value in step.outputs:
                if any(
                    axis is declared_axis
                    for layout in value.layouts
                    for declared_axis in axes_as_written(layout)
                ):
                    return f"the result of {_format_operator(step.place)}"
        return "a dimension on the way"


class _Search:
    """The axes that are tied to a layout, nearest first, and how each was reached."""

    def __init__(self, layout: Layout, is_relevant: Callable[[Axis], bool]) -> None:
        self.came_from: dict[Axis, tuple[Axis, Reason | None] | None] = {}
        waiting: deque[Axis] = deque()

        def visit(reached_layout: Layout, predecessor: tuple[Axis, Reason | None] | None) -> None:
            for axis in axes_as_written(reached_layout):
                # an axis that shares no leaf with what is looked for leads nowhere
                if axis not in self.came_from and any(map(is_relevant, leaves(axis))):
                    self.came_from[axis] = predecessor
                    waiting.append(axis)

        visit(layout, None)
        # breadth first, so that the chain to an axis is a shortest one
        while waiting:
            axis = waiting.popleft()
            for tied_layout, tie in axis.ties:
                visit(tied_layout, (axis, tie))

    def way_to(self, axis: Axis) -> list[tuple[Axis, Reason | None]]:
        """Return the axes from the start to this one, each with the tie that leads to it."""
        steps: list[tuple[Axis, Reason | None]] = []
        predecessor = self.came_from[axis]
        while predecessor is not None:
            steps.append((axis, predecessor[1]))
            axis = predecessor[0]
            predecessor = self.came_from[axis]
        return steps[::-1]


def _format_operator(reason: Reason) -> str:
    where = ", ".join(word for word in (reason.module, reason.source) if word)
    return f"{reason.operator} ({where})" if where else reason.operator
