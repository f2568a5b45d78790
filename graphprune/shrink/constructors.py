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
        seen: set[Any] = set()
        built: list[Layout] = []
        for function in _methods(type(module)):
            built += self._built(function, {text}, module, number.module, number.value, seen)
        return built

    def _built(
        self,
        function: FunctionType,
        texts: set[str],
        module: nn.Module,
        path: str,
        size: int,
        seen: set[Any],
    ) -> Iterator[Layout]:
        """Yield the dimensions that a method builds of what these expressions stand for."""
        key = (function, path, tuple(sorted(texts)))
        if key in seen or len(seen) > 200:
            return
        seen.add(key)
        for use in self._uses(function, texts):
            scope = f"{path}.{use.target}".removeprefix(".") if use.target else path
            yield from self._given(use, module, scope, size, seen)

    def _given(
        self, use: _Use, module: nn.Module, scope: str, size: int, seen: set[Any]
    ) -> Iterator[Layout]:
        callee = use.callee
        if isinstance(callee, FunctionType) and callee.__name__ == "__init__":  # the parent class's
            name = _argument(callee, use.argument)
            path = scope
            yield from self._built(callee, {name, f"self.{name}"}, module, path, size, seen)
        elif isinstance(callee, type) and issubclass(callee, nn.Module):
            name = _argument(callee.__init__, use.argument)
            for path, child in self._under(scope):
                if isinstance(child, callee):
                    yield from self._given_to(callee, name, child, path, size, seen)
        elif callee in _FACTORIES:
            layouts = self.parameters.get(scope, [])
            if isinstance(use.argument, int) and use.argument < len(layouts) and use.target:
                yield from self._of_size([layouts[use.argument]], size)
        elif use.target and callee not in vars(builtins).values():
            for name, layouts in self.parameters.items():
                if name == scope or name.startswith(f"{scope}."):
                    yield from self._of_size(layouts, size)

    def _given_to(
        self, kind: Any, name: str, child: nn.Module, path: str, size: int, seen: set[Any]
    ) -> Iterator[Layout]:
        """Yield what a module's class makes of an argument of its constructor."""
        prefix = f"{path}." if path else ""
        if is_of_torch(kind) and (name in _SIZED or name in _CHANNELS):
            for tensor, dim in _SIZED.get(name, []):
                yield from self._of_size(self.parameters.get(prefix + tensor, [])[dim:][:1], size)
            side = _CHANNELS.get(name)
            for step in self.steps.get(path, []) if side else []:
                if step.place.operator in ("aten.convolution", "aten.native_group_norm"):
                    value = (step.inputs if side == "in" else step.outputs)[0]
                    yield from self._of_size(value.layouts[1:2], size, parts="groups" in name)
        elif isinstance(kind.__init__, FunctionType):
            yield from self._built(kind.__init__, {name}, child, path, size, seen)

    def _of_size(
        self, layouts: Iterable[Layout], size: int, *, parts: bool = False
    ) -> Iterator[Layout]:
        for layout in layouts:
            if size_of(layout) == size:
                yield layout
            elif parts:
                yield from [part for length, part in self.pieces.of(layout) if length == size][:1]

    def _under(self, scope: str) -> Iterator[tuple[str, nn.Module]]:
        try:
            top = self.model.get_submodule(scope)
        except AttributeError:
            return
        for path, child in top.named_modules():
            yield ".".join(filter(None, (scope, path))), child

    def _uses(self, function: FunctionType, texts: set[str]) -> Iterator[_Use]:
        if function not in self.code:
            self.code[function] = _read(function)
        code = self.code[function]
        known = _aliases(code.pairs, texts)
        for call in code.calls:
            for argument, text in call.arguments:
                for target in call.targets if text in known else ():
                    yield _Use(_resolved(call.callee, function), argument, target)


def _methods(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if not is_of_torch(base):
            yield from (x for x in vars(base).values() if isinstance(x, FunctionType))


def _read(function: FunctionType) -> _Code:
    """Return what a function's source says; nothing where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _Code([], [])
    nodes = list(ast.walk(tree))
    assigned = [pair for node in nodes for pair in _assigned(node)]
    targets: dict[ast.AST, list[str]] = {}
    for node, target in _targets(assigned):
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


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
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
    known, new = set(texts), set(texts)
    while new:
        new = {
            other + text[len(same) :]
            for a, b in pairs
            for same, other in ((a, b), (b, a))
            for text in new
            if text == same or text.startswith(f"{same}.")
        }
        new = {text for text in new if text.count(".") < 6} - known
        known |= new
    return known


def _targets(assigned: list[tuple[ast.expr, ast.expr]]) -> Iterator[tuple[ast.AST, str]]:
    """Yield calls with the attributes of `self` that they become, alone, inside others or by a name."""
    later: dict[str, list[str]] = {}
    for target, value in assigned:
        if _is_own(target) and isinstance(value, ast.Name):
            later.setdefault(value.id, []).append(target.attr)  # type: ignore[attr-defined]
    for target, value in assigned:
        names: list[str] = []
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if _is_own(part):
                names.append(part.attr)  # type: ignore[attr-defined]
            elif isinstance(part, ast.Name):
                names += later.get(part.id, [])
        for node in ast.walk(value) if names else ():
            if isinstance(node, ast.Call):
                yield from ((node, name) for name in names)


def _is_own(target: ast.expr) -> bool:
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


def _argument(function: Callable[..., Any], argument: int | str) -> str:
    """Return the name of a constructor's argument."""
    if isinstance(argument, str):
        return argument
    try:
        names = [name for name in inspect.signature(function).parameters if name != "self"]
    except (TypeError, ValueError):
        return ""
    return names[argument] if argument < len(names) else ""


def _resolved(text: str, function: FunctionType) -> Any:
    """Return what the name of a callee stands for in a function's module, or None."""
    if text == "super().__init__":
        owner = inspect.unwrap(function).__qualname__.rpartition(".")[0]
        kind = function.__globals__.get(owner)
        bases = kind.__mro__[1:] if isinstance(kind, type) else ()
        return next((vars(b)["__init__"] for b in bases if "__init__" in vars(b)), None)
    first, *rest = text.split(".")
    value = function.__globals__.get(first, getattr(builtins, first, None))
    for name in rest:
        value = getattr(value, name, None)
    return value
