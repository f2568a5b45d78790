"""What a module's code builds of a number that it holds: the dimensions that get it as their size."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from graphprune.inference.recorded import Inference, Step
from graphprune.layout import Layout, size_of
from graphprune.shrink.dimensions import Pieces
from graphprune.shrink.held_numbers import HeldNumber, is_of_torch

# By the name of an argument of torch.nn's classes, the dimensions that have it as their size.
_SIZED = {
    "in_features": [("weight", 1)], "out_features": [("weight", 0)],
    "num_features": [("weight", 0), ("running_mean", 0)], "num_channels": [("weight", 0)],
    "normalized_shape": [("weight", -1)], "num_parameters": [("weight", 0)],
    "num_embeddings": [("weight", 0)], "embedding_dim": [("weight", 1)],
    "input_size": [("weight_ih_l0", 1), ("weight_ih", 1)],
    "hidden_size": [("weight_hh_l0", 1), ("weight_hh", 1)],
    "embed_dim": [("out_proj.weight", 0)], "kernel_size": [("weight", -1)],
}  # fmt: skip
# By argument, whether it is told of what a convolution or group norm reads or gives.
_CHANNELS = {"in_channels": "in", "out_channels": "out", "groups": "in", "num_groups": "in"}
_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.randn, torch.rand, torch.full)


@dataclass(frozen=True)
class _Use:
    """A call in a module's code that is given the number.

    Attributes:
        callee: what is called, or None where that cannot be told.
        argument: the position or name that the number is given as.
        target: the attribute that the result becomes, or "".

    """

    callee: Any
    argument: int | str
    target: str


@dataclass(frozen=True)
class _Call:
    """A call as it is written, with its arguments by position or name, and the attributes it becomes."""

    callee: str
    arguments: list[tuple[int | str, str]]
    targets: list[str]


@dataclass(frozen=True)
class _Code:
    """What a function assigns, as pairs of expressions, and calls."""

    pairs: list[tuple[str, str]]
    calls: list[_Call]


class Constructors:
    """Reads the code of a model's classes."""

    def __init__(self, model: nn.Module, inference: Inference, pieces: Pieces) -> None:
        self.model, self.parameters, self.pieces = model, inference.parameters, pieces
        self.code: dict[FunctionType, _Code] = {}
        self.steps: dict[str, list[Step]] = {}
        for step in inference.steps:
            self.steps.setdefault(step.place.module, []).append(step)

    def layouts_of(self, number: HeldNumber) -> list[Layout]:
        """Return the dimensions that are built with the number as their size."""
        module = self.model.get_submodule(number.module)
        text = ".".join(["self", *map(str, number.keys)])
        visited: set[Any] = set()
        layouts: list[Layout] = []
        for function in _methods(type(module)):
            layouts += self._follow_expressions(
                function, {text}, module, number.module, number.value, visited
            )
        return layouts

    def _follow_expressions(
        self,
        function: FunctionType,
        texts: set[str],
        module: nn.Module,
        path: str,
        size: int,
        visited: set[Any],
    ) -> Iterator[Layout]:
        """Yield the dimensions that a method builds of what these expressions stand for."""
        key = (function, path, tuple(sorted(texts)))
        # Classes may build each other: every combination is followed once, and not without end.
        if key in visited or len(visited) > 200:
            return
        visited.add(key)
        # `self.width = width` and `self.proj = nn.Linear(3, width)`: from "self.width" by its alias
        # "width" to argument 1 of nn.Linear, whose target is "proj"; so to rows of proj.weight.
        for use in self._find_uses(function, texts):
            scope = f"{path}.{use.target}".removeprefix(".") if use.target else path
            yield from self._follow_use(use, module, scope, size, visited)

    def _follow_use(
        self, use: _Use, module: nn.Module, scope: str, size: int, visited: set[Any]
    ) -> Iterator[Layout]:
        callee = use.callee
        if isinstance(callee, FunctionType) and callee.__name__ == "__init__":  # the parent class's
            name = _argument_name(callee, use.argument)
            path = scope
            yield from self._follow_expressions(
                callee, {name, f"self.{name}"}, module, path, size, visited
            )
        elif isinstance(callee, type) and issubclass(callee, nn.Module):
            name = _argument_name(callee.__init__, use.argument)
            for path, child in self._yield_modules_under(scope):
                if isinstance(child, callee):
                    yield from self._follow_constructor(callee, name, child, path, size, visited)
        elif callee in _FACTORIES:
            # `self.bias = torch.zeros(2, width)`: argument 1 is dimension 1 of what it becomes, but that of
            # `torch.full(sizes, number)` is what fills it.
            layouts = self.parameters.get(scope, [])[: 1 if callee is torch.full else None]
            if isinstance(use.argument, int) and use.argument < len(layouts) and use.target:
                yield from self._filter_by_size([layouts[use.argument]], size)
        # Any other function: whatever its result holds in a dimension of this size.
        elif use.target and callee not in vars(builtins).values():
            for name, layouts in self.parameters.items():
                if name == scope or name.startswith(f"{scope}."):
                    yield from self._filter_by_size(layouts, size)

    def _follow_constructor(
        self, kind: Any, name: str, child: nn.Module, path: str, size: int, visited: set[Any]
    ) -> Iterator[Layout]:
        """Yield what a module's class makes of an argument of its constructor."""
        prefix = f"{path}." if path else ""
        if is_of_torch(kind) and (name in _SIZED or name in _CHANNELS):
            # By slices, which are empty where there is no such tensor or dimension.
            for tensor, dim in _SIZED.get(name, []):
                yield from self._filter_by_size(
                    self.parameters.get(prefix + tensor, [])[dim:][:1], size
                )
            side = _CHANNELS.get(name)
            for step in self.steps.get(path, []) if side else []:
                if step.place.operator in ("aten.convolution", "aten.native_group_norm"):
                    # `[batch, channels, ...]`; the number of groups is a factor of the channels.
                    value = (step.inputs if side == "in" else step.outputs)[0]
                    yield from self._filter_by_size(
                        value.layouts[1:2], size, parts="groups" in name
                    )
        elif isinstance(kind.__init__, FunctionType):
            yield from self._follow_expressions(kind.__init__, {name}, child, path, size, visited)

    def _filter_by_size(
        self, layouts: Iterable[Layout], size: int, *, parts: bool = False
    ) -> Iterator[Layout]:
        for layout in layouts:
            if size_of(layout) == size:
                yield layout
            elif parts:
                yield from [part for length, part in self.pieces.of(layout) if length == size][:1]

    def _yield_modules_under(self, scope: str) -> Iterator[tuple[str, nn.Module]]:
        try:
            top = self.model.get_submodule(scope)
        except AttributeError:
            return
        for path, child in top.named_modules():
            yield ".".join(filter(None, (scope, path))), child

    def _find_uses(self, function: FunctionType, texts: set[str]) -> Iterator[_Use]:
        if function not in self.code:
            self.code[function] = _read_code(function)
        code = self.code[function]
        aliases = _aliases(code.pairs, texts)
        for call in code.calls:
            for argument, text in call.arguments:
                for target in call.targets if text in aliases else ():
                    yield _Use(_resolve_callee(call.callee, function), argument, target)


def _methods(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if not is_of_torch(base):
            yield from (x for x in vars(base).values() if isinstance(x, FunctionType))


def _read_code(function: FunctionType) -> _Code:
    """Return what a function's source says; nothing where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _Code([], [])
    nodes = list(ast.walk(tree))
    assigned = [pair for node in nodes for pair in _yield_assignments(node)]
    targets: dict[ast.AST, list[str]] = {}
    for node, target in _yield_targets(assigned):
        targets.setdefault(node, []).append(target)
    calls = [
        _Call(ast.unparse(node.func), list(_arguments(node)), targets.get(node, [""]))
        for node in nodes
        if isinstance(node, ast.Call)
    ]
    pairs = [
        (ast.unparse(target), ast.unparse(value))
        for target, value in assigned
        if not isinstance(value, ast.Constant)
    ]
    return _Code(pairs, calls)


def _yield_assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield targets and values, those of tuples one by one; targets of one value pairwise."""
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value
    yield from zip(node.targets, node.targets[1:], strict=False)


def _aliases(pairs: list[tuple[str, str]], texts: set[str]) -> set[str]:
    """Return the expressions that are assigned to each other, beginning with the given ones."""
    aliases, new_aliases = set(texts), set(texts)
    while new_aliases:
        # With the pair ("self.a", "b") the text "b.size" has the alias "self.a.size", and back.
        new_aliases = {
            alias + text[len(source) :]
            for a, b in pairs
            for source, alias in ((a, b), (b, a))
            for text in new_aliases
            if text == source or text.startswith(f"{source}.")
        }
        # `x = x.next` would make longer ones for ever.
        new_aliases = {text for text in new_aliases if text.count(".") < 6} - aliases
        aliases |= new_aliases
    return aliases


def _yield_targets(assigned: list[tuple[ast.expr, ast.expr]]) -> Iterator[tuple[ast.AST, str]]:
    """Yield calls with the attributes of `self` that they become, alone, inside others or by a name."""
    # `conv = nn.Conv2d(...)` and then `self.first = conv`: the call becomes "first" all the same.
    attributes_of: dict[str, list[str]] = {}
    for target, value in assigned:
        if _is_attribute_of_self(target) and isinstance(value, ast.Name):
            attributes_of.setdefault(value.id, []).append(target.attr)  # type: ignore[attr-defined]
    for target, value in assigned:
        attributes: list[str] = []
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if _is_attribute_of_self(part):
                attributes.append(part.attr)  # type: ignore[attr-defined]
            elif isinstance(part, ast.Name):
                attributes += attributes_of.get(part.id, [])
        for node in ast.walk(value) if attributes else ():
            if isinstance(node, ast.Call):
                yield from ((node, name) for name in attributes)


def _is_attribute_of_self(target: ast.expr) -> bool:
    return isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"


def _arguments(call: ast.Call) -> Iterator[tuple[int | str, str]]:
    """Yield what a call is given by position or name; the entries of a tuple or list by their own."""
    for position, value in enumerate(call.args):
        yield position, ast.unparse(value)
        if isinstance(value, (ast.Tuple, ast.List)):
            yield from ((inner, ast.unparse(entry)) for inner, entry in enumerate(value.elts))
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg, ast.unparse(keyword.value)


def _argument_name(function: Callable[..., Any], argument: int | str) -> str:
    """Return the name of a constructor's argument."""
    if isinstance(argument, str):
        return argument
    try:
        names = [name for name in inspect.signature(function).parameters if name != "self"]
    except (TypeError, ValueError):
        return ""
    return names[argument] if argument < len(names) else ""


def _resolve_callee(text: str, function: FunctionType) -> Any:
    """Return what the name of a callee stands for in a function's module, or None."""
    if text == "super().__init__":
        class_name = inspect.unwrap(function).__qualname__.rpartition(".")[0]
        # super() goes by the class that the method is written in, not by that of the instance.
        defining_class = function.__globals__.get(class_name)
        bases = defining_class.__mro__[1:] if isinstance(defining_class, type) else ()
        return next((vars(base)["__init__"] for base in bases if "__init__" in vars(base)), None)
    head, *attributes = text.split(".")
    callee = function.__globals__.get(head, getattr(builtins, head, None))
    for name in attributes:
        callee = getattr(callee, name, None)
    return callee
