"""The registry of rules, and what a rule sees of the operator call that it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket

from graphprune.errors import InvalidRequestError
from graphprune.layout import Axis, Layout, Reason, fix, mark_renormalised, size_of, unify

Layouts: TypeAlias = list[Layout]
Operator: TypeAlias = OpOverload | OpOverloadPacket | str
"""An overload, a packet (all of its overloads), or a packet's name, `library::operator`, which need
not be loaded yet."""

Ask: TypeAlias = Callable[[], None]
"""What an output of a call asks for, such as to fix a dimension."""


@dataclass(frozen=True)
class Numbers:
    """Whole numbers in a row that no input changes.

    Attributes:
        name: of the buffer or attribute that holds them; "" where they stand in the model's code.
        values: the numbers.

    """

    name: str
    values: tuple[int, ...]


@dataclass
class Call:
    """One operator call: its arguments by name, the layouts of its tensors, and what it returned.

    Attributes:
        func: the ATen overload that was called.
        arguments: value of every argument of the schema by name, defaults filled in.
        layouts_of: the layouts of a tensor argument, one a dimension.
        outputs: the tensors that came back, in order.
        reason: where the call stands in the model, to name in reasons.
        strides: of the first tensor argument, as they were before the call.
        renormalises: set once a statistic along an axis that could be cut was declared; it is then
            compared on the kept slots alone.
        numbers_of: what a tensor argument holds, where that is known.
        asks: by the number of an output, what it asks for once it is read.
        addressed: by `Numbers.name` of what says in which order the slots of a dimension come, that
            dimension.

    """

    func: OpOverload
    arguments: dict[str, Any]
    layouts_of: Callable[[Tensor], Layouts]
    outputs: list[Tensor]
    reason: Reason
    strides: tuple[int, ...] = ()
    numbers_of: Callable[[Tensor], Numbers | None] = lambda _: None
    renormalises: bool = field(default=False, init=False)
    asks: dict[int, list[Ask]] = field(default_factory=dict, init=False)
    addressed: dict[str, Layout] = field(default_factory=dict, init=False)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor arguments in schema order, those inside lists included."""
        return list(tensors_in(self.arguments.values()))

    def layouts(self, name: str) -> Layouts:
        """Return the layouts of the tensor argument of that name, one a dimension."""
        return self.layouts_of(self.arguments[name])

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """Return the argument `name` as a non-negative dimension of the tensor argument `of`."""
        rank: int = self.arguments[of].dim()
        return int(self.arguments[name]) % max(rank, 1)

    def why(self, why: str) -> Reason:
        """Return a reason that names this call."""
        at = self.reason
        return Reason(why, at.operator, at.module, at.source)

    def unify(self, a: Layout, b: Layout, why: str = "sizes that do not fit together") -> None:
        """Make two dimensions lose the same slots."""
        unify(a, b, self.why(why))

    def fix(self, layout: Layout, why: str) -> None:
        """Forbid removals along a dimension."""
        fix(layout, self.why(why))

    def fixed(self, size: int, why: str) -> Axis:
        """Return a dimension that is born fixed."""
        return Axis(size, self.why(why))

    def when_read(self, output: int, ask: Ask) -> None:
        """Do something, `fix` say, only if an output is read: by an operator, or as one of the model's.

        Args:
            output: its number.
            ask: does it; called once, later in the run.

        """
        self.asks.setdefault(output, []).append(ask)

    def renormalise(self, layout: Layout, what: str) -> None:
        """Declare that a statistic is taken along a dimension, so that cutting it is inexact."""
        if size_of(layout) > 1:
            mark_renormalised(layout, self.why(what))
            self.renormalises = True


Rule: TypeAlias = Callable[[Call], Sequence[Layouts]]
"""From a call to the layouts of its outputs, one list an output tensor."""

_RULES: dict[OpOverload | str, Rule] = {}


def register(rule: Rule, *operators: Operator) -> None:
    """Give `operators` a rule.

    Raises:
        InvalidRequestError: one of them has a rule already.

    """
    for operator in operators:
        key = _key(operator)
        if key in _RULES:
            raise InvalidRequestError(f"{operator} has a rule already; each operator takes one")
        _RULES[key] = rule
    rule_for.cache_clear()


def unregister(*operators: Operator) -> None:
    """Take the rules of `operators` away again."""
    for operator in operators:
        _RULES.pop(_key(operator), None)
    rule_for.cache_clear()


def _key(operator: Operator) -> OpOverload | str:
    """Return what an operator's rule is kept under: a packet goes by its name."""
    return operator._qualified_op_name if isinstance(operator, OpOverloadPacket) else operator


def rule(*operators: Operator) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a function as the rule of `operators`."""

    def decorate(function: Rule) -> Rule:
        register(function, *operators)
        return function

    return decorate


def list_rules() -> dict[OpOverload | str, Rule]:
    """Return the rules by overload or by name of a packet, in order of registration."""
    return dict(_RULES)


@lru_cache(maxsize=4096)
def rule_for(func: OpOverload) -> Rule | None:
    """Return the rule of an overload: its own, its packet's, its out-of-place twin's, or None."""
    for operator in (func, func.overloadpacket, _twin_of(func)):
        if operator is not None and _key(operator) in _RULES:
            return _RULES[_key(operator)]
    if torch.Tag.pointwise in func.tags:
        return _RULES.get(_key(POINTWISE))
    return None


def _twin_of(func: OpOverload) -> OpOverloadPacket | None:
    """Return the packet that an in-place or view-copying operator writes the result of."""
    namespace = getattr(torch.ops, func.namespace)
    name = func._schema.name.split("::")[1]
    # `aten.relu` for `aten.relu_`, `aten.view` for `aten.view_copy`.
    for suffix in ("_copy",) if torch.Tag.view_copy in func.tags else ("_",):
        if name.endswith(suffix) and hasattr(namespace, name.removesuffix(suffix)):
            return getattr(namespace, name.removesuffix(suffix))  # type: ignore[no-any-return]
    return None


def functional_twin(func: OpOverload) -> OpOverload | None:
    """Return the overload that gives the result which an in-place one writes, or None."""
    packet = _twin_of(func)
    return getattr(packet, func._overloadname, None) if packet is not None else None


# The operator whose rule serves every operator that is tagged pointwise.
POINTWISE: Operator = torch.ops.aten.add


@lru_cache(maxsize=4096)
def is_in_place(func: OpOverload) -> bool:
    """Say whether the first argument is written to and returned."""
    target = func._schema.arguments[0] if func._schema.arguments else None
    return target is not None and target.alias_info is not None and target.alias_info.is_write


def bind_arguments(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their schema names, with defaults."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a graph's call of an ATen operator by their schema names."""
    return bind_arguments(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]


def writes(node: fx.Node) -> bool:
    """Say whether a node of a graph writes over its first argument."""
    return isinstance(node.target, OpOverload) and is_in_place(node.target)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among values and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
