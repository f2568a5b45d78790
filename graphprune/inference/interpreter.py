"""Running a model and seeing every ATen operator that it calls, in order and in float64 where it can.

Inference and verification are two interpretations of the same stream of operators: one gives each
tensor its layouts, the other sets the removed slots of each tensor to zero.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._ops import HigherOrderOperator, OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphprune.inference import kernels
from graphprune.inference.precision import Precision
from graphprune.layout import Reason
from graphprune.rules import Rule, functional_twin, is_in_place, rule_for, tensors_in
from graphprune.rules.recurrent import overload_of
from graphprune.utils.inputs import Inputs
from graphprune.utils.lru_caches import without_caches
from graphprune.utils.torch_context import fixed_seed, reference_kernels

# Folders of code that is not the user's; a folder beside one may begin with its name (torchvision).
_LIBRARY_FOLDERS = tuple(
    os.path.join(folder, "")
    for folder in (Path(torch.__file__).parent, Path(__file__).absolute().parents[1])
)
# Names of code that no file holds; a notebook's cells, which are the user's, may be "<ipython-input-...>".
_GENERATED_SOURCES = ("<eval_with_key>", "<frozen ")


class Interpretation(TorchDispatchMode):
    """A dispatch mode that hands each operator, with its rule, to `step`.

    An operator that has no rule but is defined by simpler ones is replaced by those. Whatever makes
    a floating-point tensor makes it in float64, so that rounding never hides or feigns a difference;
    an operator that cannot do so is run on rounded copies, which `precision` notes.
    """

    supports_higher_order_operators = True

    def __init__(self, precision: Precision | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precision = precision or Precision()
        self.module_path: list[str] = []
        self.node: fx.Node | None = None

    def step(self, func: OpOverload, rule: Rule | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator and return its result."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            return self.higher_order(func, args, kwargs or {})
        kwargs = self._convert_dtype_argument(func, args, kwargs or {})
        rule = rule_for(func)
        if rule is None:
            # A dispatch mode is off while it dispatches;
            # entered again, it sees the simpler operators.
            with self:
                result = _decompose(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.step(func, rule, args, kwargs)

    def run(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the operator itself; new results are in float64 and lie in memory row by row.

        Were they to lie as the kernel pleases, two runs could differ in where a reshape has to copy.
        """
        result = self._run_as_it_can(func, args, kwargs)
        # These return the memory of an operand; a copy in another type would no longer be it.
        if is_in_place(func) or func.is_view:
            return result
        # `arange` makes float32 from no float64 operand: it rounded nothing, so nothing is noted.
        if not self.precision.double or kernels.takes_doubles(args, kwargs):
            for tensor in tensors_in(result if isinstance(result, (tuple, list)) else [result]):
                self.precision.note(func, tensor.dtype)
        return pytree.tree_map_only(Tensor, self._normalize, result)

    def _run_as_it_can(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the operator; where it does not take float64, on copies in a type that it takes.

        One that takes none of them fails for another reason, which the usual type of models shows best.
        """
        try:
            return kernels.run(func, args, kwargs)
        except Exception as failure:
            if not (
                kernels.takes_doubles(args, kwargs) and kernels.may_lack_doubles(func, failure)
            ):
                raise
        failures: list[Exception] = []
        for dtype in kernels.FALLBACK_DTYPES:
            try:
                result = kernels.run_rounded(func, args, kwargs, dtype)
            except Exception as failure:
                failures.append(failure)
                continue
            self.precision.note(func, dtype)
            return result
        raise failures[0]

    def _normalize(self, tensor: Tensor) -> Tensor:
        retyped = self.precision.convert(tensor)
        if retyped.layout is not torch.strided or retyped.is_contiguous():
            return retyped
        return retyped.contiguous()

    def _convert_dtype_argument(
        self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments by name, with the type asked for or needed by a number as it is held."""
        dtype = kwargs.get("dtype")
        if dtype is None and func is torch.ops.aten.full.default and self.precision.double:
            # `full(size, 0.5)` without a type would make float32.
            number = args[1] if len(args) > 1 else kwargs["fill_value"]
            dtype = torch.float64 if isinstance(number, float) else None
        return kwargs if dtype is None else {**kwargs, "dtype": self.precision.type_of(dtype)}

    def read_by_code(self, tensor: Tensor) -> None:
        """See that the model's code looks at the values of a tensor."""

    def higher_order(
        self, func: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operator that takes functions (`torch.cond`), whose inside is not seen."""
        return func(*args, **kwargs)

    def place(self, func: OpOverload | HigherOrderOperator) -> Reason:
        """Return where the current call stands: operator, module path and source line."""
        schema = getattr(func, "_schema", None)
        name = schema.name.replace("::", ".") if schema else str(func)
        if self.node is not None:
            owner = str(self.node.target) if self.node.op == "call_module" else self.node.name
            return Reason("", name, owner, _source_of(self.node))
        path = self.module_path[-1] if self.module_path else ""
        return Reason("", name, path, _source_line())


# Reads values without calling an operator.
_READERS_OF_VALUES = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)


class _BeforeDispatch(TorchFunctionMode):
    """Sees what is called before torch takes it apart.

    Recurrent operators are handed whole to an interpretation. A number that only float64 holds (its
    limits, as the model's code reads them off a tensor) becomes a tensor of that type.
    """

    def __init__(self, mode: Interpretation) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        number = args[0] if args else kwargs.get("data")
        untyped = func is torch.tensor and kwargs.get("dtype") is None
        if untyped and isinstance(number, float) and self.mode.precision.double:
            return func(*args, **{**kwargs, "dtype": torch.float64})
        if func in _READERS_OF_VALUES:
            self.mode.read_by_code(args[0])
        recurrent_operator = overload_of(func, args)
        if recurrent_operator is None:
            return func(*args, **kwargs)
        # As for any operator: with the modes off, or what it is made of would be seen too.
        with _disable_current_modes():
            return self.mode.step(recurrent_operator, rule_for(recurrent_operator), args, kwargs)


def _decompose(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the result by way of the operator's own definition, or NotImplemented."""
    if func.namespace == "prim" or torch.Tag.nondeterministic_seeded in func.tags:
        return NotImplemented
    # `relu_` is `relu` written over its operand, so the definition of `relu` serves both.
    twin = functional_twin(func) if is_in_place(func) else None
    if twin in decomposition_table:
        return args[0].copy_(decomposition_table[twin](*args, **kwargs))
    if func in decomposition_table and not is_in_place(func):
        return decomposition_table[func](*args, **kwargs)
    return func.decompose(*args, **kwargs)


def _source_line() -> str:
    """Return file and line of the innermost frame that belongs to neither torch nor graphprune."""
    # Two frames up: this function and the method that asks are no user's code.
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_LIBRARY_FOLDERS + _GENERATED_SOURCES):
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _source_of(node: fx.Node) -> str:
    """Return file and line of the code that a graph node came from, where the tracer kept it."""
    lines = [
        line for line in (node.stack_trace or "").splitlines() if line.lstrip().startswith("File")
    ]
    # A stack trace ends with the innermost call.
    for line in reversed(lines):
        path, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
        if not path.startswith(_LIBRARY_FOLDERS):
            return f"{os.path.basename(path)}:{number}"
    return ""


def interpret(model: nn.Module, inputs: Inputs, mode: Interpretation) -> Any:
    """Return the model's output, computed under the mode.

    Args:
        model: a copy that may be given hooks; a graph module is run node by node, so that the mode
            knows the node.
        inputs: what to run it on.
        mode: sees the operators.

    """
    with (
        without_caches(model),
        reference_kernels(),
        fixed_seed(),
        mode,
        _BeforeDispatch(mode),
    ):
        if isinstance(model, fx.GraphModule):
            return _NodeByNode(model, mode).run_with(inputs)
        with _record_module_paths(model, mode.module_path):
            return model(*inputs.args, **inputs.kwargs)


@contextmanager
def _record_module_paths(model: nn.Module, stack: list[str]) -> Iterator[None]:
    # A call that fails leaves no path behind: its second hook is called in any case.
    handles = []
    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda *_, path=path: stack.append(path), prepend=True)
        )
        handles.append(module.register_forward_hook(lambda *_: _pop(stack), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()


def _pop(stack: list[str]) -> None:
    if stack:
        stack.pop()


class _NodeByNode(fx.Interpreter):
    """Runs a graph and tells the mode which node is running and what it gave."""

    def __init__(self, graph_module: fx.GraphModule, mode: Interpretation) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # which would be added to what our own errors say
        self.mode = mode

    def run_with(self, inputs: Inputs) -> Any:
        return self.run(*flatten_arguments(self.module, inputs), enable_io_processing=False)  # type: ignore[arg-type]

    def run_node(self, node: fx.Node) -> Any:
        self.mode.node = node
        result = super().run_node(node)
        self.mode.node = None
        after_node = getattr(self.mode, "after_node", None)
        if after_node is not None:
            after_node(node, result)
        return result


def _get_second_child(spec: Any) -> Any:
    """Return the second child of a tree spec, whose fields became methods after torch 2.9."""
    return spec.child(1) if hasattr(spec, "child") else spec.children_specs[1]


def flatten_arguments(graph_module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """Return the values of the graph's placeholders for the given arguments."""
    pytree_info = getattr(graph_module.graph._codegen, "pytree_info", None)
    if (
        pytree_info is not None
        and pytree_info.in_spec.type is tuple
        and pytree_info.in_spec.num_children == 2
    ):
        keyword_order = _get_second_child(pytree_info.in_spec).context or []
        kwargs = {name: inputs.kwargs[name] for name in keyword_order if name in inputs.kwargs}
        return pytree.tree_leaves((tuple(inputs.args), kwargs), is_leaf=lambda leaf: leaf is None)
    # A placeholder has its default, if there is one, as its only argument.
    values = list(inputs.args)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for node in placeholders[len(values) :]:
        name = str(node.target)
        values.append(
            inputs.kwargs[name] if name in inputs.kwargs else node.args[0] if node.args else None
        )
    return values
