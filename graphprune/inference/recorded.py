"""What a run of the rules over a model records: its tensors, its operators, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch._ops import OpOverload

from graphprune.layout import Axis, Layout, Reason
from graphprune.rules import Ask, Layouts, Numbers
from graphprune.utils.inputs import Inputs


@dataclass
class Value:
    """A tensor of the model: what its dimensions are made of, and what made it.

    Attributes:
        layouts: one layout a dimension.
        source: the name of a parameter, buffer, attribute or input, or the number of a step.
        asks: what is to be done once something reads it.
        numbers: what it holds, where that is known.

    """

    layouts: Layouts
    source: str | int
    asks: list[Ask] = field(default_factory=list, repr=False, compare=False)
    numbers: Numbers | None = None


@dataclass
class Step:
    """One operator call of the run.

    Attributes:
        func: the ATen overload.
        place: operator, module path and source line.
        inputs: its tensor arguments in schema order.
        outputs: what it returned.
        arguments: its arguments by schema name, tensors replaced by their values.
        renormalises: whether it takes a statistic along an axis.
        node: for a graph, the name of the node that called it.
        addresses: whether it puts slots in an order that the model holds as numbers.

    """

    func: OpOverload
    place: Reason
    inputs: list[Value]
    outputs: list[Value]
    arguments: dict[str, Any]
    renormalises: bool = False
    node: str = ""
    addresses: bool = False


@dataclass
class Inference:
    """What a run of the rules over a model found.

    Attributes:
        parameters: by name, the layouts of every parameter, buffer and tensor attribute.
        trainable: which of those names are parameters.
        names: for tensors that have several names, all of them by the first.
        inputs: layouts of the model's input tensors by name.
        outputs: layouts of the model's output tensors by name.
        output_sources: where each of them comes from, as `Value.source`.
        steps: the operator calls in order.
        nodes: for a graph, by node name, the layouts of what it gave, in the structure it gave it.
        addressed: by name of a buffer whose numbers say in which order the slots of a dimension come,
            that dimension's layout; these numbers change when slots go.
        unknown: places of operators that have no rule.
        unused: names of parameters that the run never read.
        half_read: names of those that only training reads, where it fails on these inputs further on.
        with_data: whether the model's code asked for values, so that it ran on its real tensors.
        others: what runs at other sizes of the inputs found, where these were needed and possible.
        in_double: whether it ran in float64; in its own types if it does not run so.

    """

    parameters: dict[str, Layouts] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    names: dict[str, list[str]] = field(default_factory=dict)
    inputs: dict[str, Layouts] = field(default_factory=dict)
    outputs: dict[str, Layouts] = field(default_factory=dict)
    output_sources: dict[str, str | int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    addressed: dict[str, Layout] = field(default_factory=dict)
    unknown: list[Reason] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    half_read: set[str] = field(default_factory=set)
    with_data: bool = False
    in_double: bool = True
    others: list[OtherRun] = field(default_factory=list)

    @property
    def unknown_here(self) -> set[str]:
        """Names of parameters of whose use the run shows nothing, or not all."""
        return self.half_read.union(self.unused)


@dataclass
class OtherRun:
    """What the rules find at other sizes of the inputs.

    Attributes:
        inputs: the example inputs at those sizes.
        inference: what a run on them found.
        axes: by each axis of the first run that may be cut, the same axis in this one; an axis is left
            out where nothing here reads it.

    """

    inputs: Inputs
    inference: Inference
    axes: dict[Axis, Axis]
