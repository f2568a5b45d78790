"""The dependency graph as people see it: groups of channels that go together, and why others stay."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from graphprune.errors import InvalidRequestError
from graphprune.groups.explain import Explainer, Explanation
from graphprune.inference.infer import infer
from graphprune.inference.recorded import Inference, Value
from graphprune.layout import (
    Axis,
    Concat,
    Layout,
    Permuted,
    Product,
    Reason,
    describe,
    free_axes,
    parts_of,
    resolve,
    why_fixed,
)


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer that loses slots when its group does."""

    parameter: str
    dim: int
    layout: Layout


@dataclass(frozen=True)
class Group:
    """Channels that can be removed, one by one, from everything that they run through.

    Attributes:
        name: the first member, as `parameter:dim`, and which factor of it where it has several.
        axis: the axis of the layouts that this group is.
        members: every parameter and buffer dimension that the channels run through.
        inner: whether the channels lie inside larger units that are cut by default instead (the
            features of a head, the channels of a convolution group).
        renormalised: operators that take a statistic over the channels, so that a cut is inexact.

    """

    name: str
    axis: Axis
    members: tuple[Member, ...]
    inner: bool

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.axis.size

    @property
    def renormalised(self) -> tuple[Reason, ...]:
        """Operators that take a statistic over the channels."""
        return self.axis.renormalised

    @property
    def exact(self) -> bool:
        """Whether the model without some channels equals the model with them silenced."""
        return not self.renormalised

    def __str__(self) -> str:
        kind = "exact" if self.exact else "renormalised"
        places = ", ".join(f"{member.parameter}:{member.dim}" for member in self.members[:6])
        more = f" and {len(self.members) - 6} more" if len(self.members) > 6 else ""
        return f"{self.name}  {self.size} channels, {kind}{', inner' if self.inner else ''}: {places}{more}"


@dataclass(frozen=True)
class Fixed:
    """A dimension of a parameter that keeps all of its slots, and why."""

    parameter: str
    dim: int
    size: int
    reason: Reason

    def __str__(self) -> str:
        return f"{self.parameter}:{self.dim}  {self.size} fixed: {self.reason}"


def operator_id(number: int) -> str:
    """Return what a step is called as a node."""
    return f"operator {number}"


class DependencyGraph:
    """Which channels of a model go together, which stay, and why; made by `analyze`.

    Attributes:
        inference: the layouts that everything here is read from.
        groups: what can be cut, in the order of the model's parameters.
        fixed: parameter dimensions in which nothing can be cut.

    """

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.groups = _groups(inference)
        self.fixed = list(_fixed(inference))

    @cached_property
    def by_axis(self) -> dict[Axis, Group]:
        """The group of each axis."""
        return {group.axis: group for group in self.groups}

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The group of each name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def names(self) -> dict[Axis, str]:
        """The name of the group of each axis."""
        return {axis: group.name for axis, group in self.by_axis.items()}

    @property
    def unknown(self) -> list[Reason]:
        """Operators that have no rule, so that everything they touch is fixed."""
        return self.inference.unknown

    def explain(self, parameter: str, dim: int) -> Explanation:
        """Return what a dimension of a parameter is tied to, or why it stays, and by which operators.

        Raises:
            InvalidRequestError: the model has no such parameter or dimension.

        """
        explanations = self.explain_all(parameter)
        if not -len(explanations) <= dim < len(explanations):
            raise InvalidRequestError(
                f"there is no dimension {dim} of {parameter!r}, which has {len(explanations)}"
            )
        return explanations[dim]

    def explain_all(self, parameter: str) -> list[Explanation]:
        """Return the explanations of all dimensions of a parameter, buffer or tensor attribute.

        Raises:
            InvalidRequestError: the model has none of that name.

        """
        inference = self.inference
        firsts = (first for first, names in inference.names.items() if parameter in names)
        first = next(firsts, parameter)
        if first not in inference.parameters:
            alike = difflib.get_close_matches(parameter, inference.parameters, cutoff=0)
            raise InvalidRequestError(
                f"the model has no parameter or buffer {parameter!r}; the nearest names are "
                f"{', '.join(alike)}"
            )
        explainer = Explainer(inference)
        return [
            explainer.explained(first, dim, self.names)
            for dim in range(len(inference.parameters[first]))
        ]

    def to_networkx(self) -> nx.MultiDiGraph:
        """Return operators and tensors as nodes, and the flow of values between them as edges.

        All attributes are texts, so that every format can hold them. Nodes carry `kind` ("operator",
        "parameter", "buffer", "input", "output", "constant"), `label`, `module`, `source`, `layout` (in
        words, a dimension each) and `groups` (what of it can be cut); edges carry `layout` and `groups`.
        """
        graph = nx.MultiDiGraph()
        for name, layouts in self.inference.parameters.items():
            kind = "parameter" if name in self.inference.trainable else "buffer"
            owner = name.rpartition(".")[0]
            graph.add_node(name, kind=kind, label=name, module=owner, **self._words(layouts))
        for name, layouts in self.inference.inputs.items():
            graph.add_node(f"input {name}", kind="input", label=name, **self._words(layouts))
        for number, step in enumerate(self.inference.steps):
            graph.add_node(
                operator_id(number), kind="operator", label=step.place.operator,
                module=step.place.module, source=step.place.source,
                **self._words([x for value in step.outputs for x in value.layouts]),
            )  # fmt: skip
            for value in step.inputs:
                self._add_edge(graph, value, operator_id(number))
        for name, layouts in self.inference.outputs.items():
            graph.add_node(f"output {name}", kind="output", label=name, **self._words(layouts))
            value = Value(layouts, self.inference.output_sources[name])
            self._add_edge(graph, value, f"output {name}")
        return graph

    def _add_edge(self, graph: nx.MultiDiGraph, value: Value, target: str) -> None:
        source = self._id_of(value.source)
        if source not in graph:
            graph.add_node(source, kind="constant", label=source)
        graph.add_edge(source, target, **self._words(value.layouts))

    def _id_of(self, source: str | int) -> str:
        """Return the node that a value comes from."""
        if isinstance(source, int):
            return operator_id(source)
        return f"input {source}" if source in self.inference.inputs else source

    def _words(self, layouts: list[Layout]) -> dict[str, str]:
        axes = dict.fromkeys(axis for layout in layouts for axis in free_axes(layout))
        return {
            "layout": ", ".join(describe(layout, self.names) for layout in layouts),
            "groups": ", ".join(self.names[axis] for axis in axes if axis in self.names),
        }

    def save(
        self,
        path: str | Path,
        *,
        title: str = "",
        scores: dict[str, Any] | None = None,
        plan: Any = None,
    ) -> None:
        """Write the graph as a page (.html), a picture (.svg, .png) or data (.json, .graphml).

        Args:
            path: where to, and by its ending, what.
            title: what to call the model; the name of the file by default.
            scores: by group, the importance of each channel, drawn as histograms on the page.
            plan: a `Plan`, whose kept and removed channels the page shows.

        Raises:
            InvalidRequestError: the path ends otherwise, or matplotlib, which draws, is missing.

        """
        from graphprune.inspection import save

        save(self, Path(path), title, scores, plan)

    def _repr_html_(self) -> str:
        """Return the page in a frame, as notebooks show it."""
        from graphprune.inspection import framed

        return framed(self)

    def __str__(self) -> str:
        lines = [f"groups that can be cut: {len(self.groups)}"]
        lines += [f"  {group}" for group in self.groups]
        lines += [f"parameter dimensions that are fixed: {len(self.fixed)}"]
        lines += [f"  {fixed}" for fixed in self.fixed]
        if self.unknown:
            lines.append(f"operators without a rule, whose channels stay: {len(self.unknown)}")
            lines += [
                f"  {place.operator}  {place.module}  {place.source}" for place in self.unknown
            ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<DependencyGraph: {len(self.groups)} groups, {len(self.fixed)} fixed dimensions>"


def _groups(inference: Inference) -> list[Group]:
    members: dict[Axis, list[Member]] = {}
    names: dict[Axis, str] = {}
    inner: set[Axis] = set()
    for parameter in sorted(inference.parameters, key=lambda p: p not in inference.trainable):
        for dim, layout in enumerate(inference.parameters[parameter]):
            axes = free_axes(layout)
            inner.update(_inner_axes(layout, inner))
            for number, axis in enumerate(axes):
                members.setdefault(axis, []).append(Member(parameter, dim, resolve(layout)))
                suffix = f".{number}" if len(axes) > 1 else ""
                names.setdefault(axis, f"{parameter}:{dim}{suffix}")
    return [
        Group(names[axis], axis, tuple(found), axis in inner) for axis, found in members.items()
    ]


def _inner_axes(layout: Layout, known: set[Axis]) -> Iterator[Axis]:
    """Yield the free axes that stand to the right of a free axis in a product.

    Axes known to be inner elsewhere do not count as outer ones, so that of two axes that stand in
    both orders in different places, the one seen first as the outer one is cut.
    """
    layout = resolve(layout)
    if isinstance(layout, Concat | Permuted):
        for part in parts_of(layout):
            yield from _inner_axes(part, known)
    elif isinstance(layout, Product):
        below = False
        for factor in layout.factors:
            if below:
                yield from free_axes(factor)
            else:
                yield from _inner_axes(factor, known)
                below = any(axis not in known for axis in free_axes(factor))


def _fixed(inference: Inference) -> Iterator[Fixed]:
    for parameter, layouts in inference.parameters.items():
        for dim, layout in enumerate(layouts):
            reason = why_fixed(layout)
            if reason is not None and not free_axes(layout):
                resolved = resolve(layout)
                size = resolved.size if isinstance(resolved, Axis) else 0
                yield Fixed(parameter, dim, size, reason)


def analyze(model: nn.Module, example_inputs: Any = None) -> DependencyGraph:
    """Return the dependency graph of a model: groups of channels, and why others are fixed.

    Args:
        model: any module; its weights are not read, so one on the meta device will do.
        example_inputs: a tensor, a tuple, a dict or `Inputs`; None where they can be guessed.

    Raises:
        CaptureError: the model does not run on the inputs, or none were given and none fit.

    """
    from graphprune.capture.capture import prepared

    module, inputs = prepared(model, example_inputs)
    return DependencyGraph(infer(module, inputs))
