"""From a model and example inputs to the layouts of every tensor: the rules, run over the operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from graphprune.adapters import fix_ranks
from graphprune.errors import CaptureError
from graphprune.inputs import Inputs, output_tensors
from graphprune.interpretation import Interpretation, interpret
from graphprune.layout import Axis, Reason, fix, flattened, size_of
from graphprune.rules import (
    Call,
    Layouts,
    Rule,
    bind_arguments,
    is_in_place,
    pointwise,
    tensors_in,
)
from graphprune.state import copy_with, double_copy, double_of, named_tensors
from graphprune.switches import hushed

UNKNOWN = "an operator without a rule"


@dataclass
class Value:
    """A tensor of the model: what its dimensions are made of, and what made it.

    Attributes:
        layouts: one layout a dimension.
        source: the name of a parameter, buffer, attribute or input, or the number of a step.

    """

    layouts: Layouts
    source: str | int


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

    """

    func: OpOverload
    place: Reason
    inputs: list[Value]
    outputs: list[Value]
    arguments: dict[str, Any]
    renormalises: bool = False
    node: str = ""


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
        unknown: places of operators that have no rule.
        unused: names of parameters that the run never read.
        with_data: whether the model's code asked for values, so that it ran on its real tensors.

    """

    parameters: dict[str, Layouts] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    names: dict[str, list[str]] = field(default_factory=dict)
    inputs: dict[str, Layouts] = field(default_factory=dict)
    outputs: dict[str, Layouts] = field(default_factory=dict)
    output_sources: dict[str, str | int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    unknown: list[Reason] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    with_data: bool = False


class LayoutInference(Interpretation):
    """Gives every tensor its layouts by the rule of the operator that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Inference()
        self.values: Any = WeakTensorKeyDictionary()
        self.in_training = False

    def declare(self, tensor: Tensor, layouts: Layouts, source: str | int) -> Value:
        """Give a tensor its layouts."""
        value = Value(layouts, source)
        self.values[tensor] = value
        return value

    def value_of(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor; one that came from nowhere is fixed."""
        value = self.values.get(tensor)
        if value is None:
            why = Reason("a tensor that is neither parameter, buffer, attribute nor input")
            value = self.declare(tensor, [Axis(size, why) for size in tensor.shape], "constant")
        return value  # type: ignore[no-any-return]

    def layouts_of(self, tensor: Tensor) -> Layouts:
        """Return the layouts of a tensor."""
        return self.value_of(tensor).layouts

    def step(self, func: OpOverload, rule: Rule | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the operator, apply its rule and record both."""
        arguments = bind_arguments(func, args, kwargs)
        operands = list(tensors_in(arguments.values()))
        inputs = [self.value_of(tensor) for tensor in operands]
        strides = operands[0].stride() if operands else ()
        result = self.run(func, args, kwargs)
        outputs = list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))
        if not outputs:
            return result
        call = Call(func, arguments, self.layouts_of, outputs, self.place(func), strides)
        layouts = self._apply(rule, call)
        if torch.Tag.inplace_view in func.tags:
            values = [self.declare(operands[0], layouts[0], len(self.found.steps))]
        elif is_in_place(func):
            self._write_back(call, operands[0], layouts)
            values = [self._written(operands[0], inputs[0])]
        else:
            values = [
                self.declare(tensor, list(map(flattened, dims)), len(self.found.steps))
                for tensor, dims in zip(outputs, layouts, strict=True)
            ]
        recorded = pytree.tree_map_only(Tensor, self.value_of, arguments)
        node = "" if self.node is None else self.node.name
        self.found.steps.append(
            Step(func, call.reason, inputs, values, recorded, call.renormalises, node)
        )
        return result

    def higher_order(
        self, func: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operator that takes functions, and fix everything that goes in and comes out."""
        result = super().higher_order(func, args, kwargs)
        place = self.place(func)
        self.found.unknown.append(place)
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                for layout in self.layouts_of(leaf):
                    fix(layout, Reason(UNKNOWN, place.operator, place.module, place.source))
        return result

    def _apply(self, rule: Rule | None, call: Call) -> list[Layouts]:
        by_chance = torch.Tag.nondeterministic_seeded in call.func.tags
        if self.in_training and by_chance and call.tensors:
            rule = pointwise.pointwise  # dropout: nothing is compared, so chance does no harm
        if rule is None:
            self.found.unknown.append(call.reason)
            return _opaque(call, UNKNOWN)
        given = list(rule(call))
        shapes = [list(output.shape) for output in call.outputs]
        why = "a result that the rule does not describe"
        given += [[call.fixed(n, why) for n in shape] for shape in shapes[len(given) :]]
        for index, shape in enumerate(shapes):
            if [size_of(layout) for layout in given[index]] != shape:
                if index == 0:
                    return _opaque(call, "a rule that does not fit this call")
                given[index] = [call.fixed(n, why) for n in shape]
        return given[: len(shapes)]

    def _write_back(self, call: Call, target: Tensor, layouts: list[Layouts]) -> None:
        for mine, written in zip(self.layouts_of(target), layouts[0], strict=True):
            if size_of(mine) > 1:
                call.unify(mine, written)

    def _written(self, tensor: Tensor, before: Value) -> Value:
        """Return a tensor that was written over: it comes from there now, unless it is the model's own."""
        if isinstance(before.source, str):
            return before
        return self.declare(tensor, before.layouts, len(self.found.steps))

    def after_node(self, node: fx.Node, result: Any) -> None:
        """Keep the layouts of what a graph node gave."""
        self.found.nodes[node.name] = pytree.tree_map_only(Tensor, self.layouts_of, result)


def _opaque(call: Call, why: str) -> list[Layouts]:
    """Fix everything that a call touches."""
    for tensor in call.tensors:
        for layout in call.layouts_of(tensor):
            call.fix(layout, why)
    return [[call.fixed(size, why) for size in output.shape] for output in call.outputs]


@torch.inference_mode(False)
def infer(model: nn.Module, inputs: Inputs, *, with_data: bool = False) -> Inference:
    """Return the layouts of a model's tensors, found by running it on tensors without data.

    Where the model's Python code asks for values (data-dependent control flow), it is run on its
    real tensors instead.

    Args:
        model: any module; it is not changed, and its weights are not read unless values are asked for.
        inputs: example inputs; only shapes and types matter, unless values are asked for.
        with_data: run it on its real tensors at once.

    Raises:
        CaptureError: the model does not run on the inputs.

    """
    if with_data:
        return _infer_with_data(model, inputs)
    try:
        with without_data(model, inputs) as (stand_in, its_inputs):
            return _infer(stand_in, its_inputs)
    except CaptureError:
        raise
    except Exception as failure:
        if any(tensor.is_meta for tensor in named_tensors(model).values()):
            raise not_runnable(model, inputs, failure) from failure
    return _infer_with_data(model, inputs)


def _infer_with_data(model: nn.Module, inputs: Inputs) -> Inference:
    real_model = copy_with(model, lambda _, tensor: double_copy(tensor))
    try:
        found = _infer(real_model, inputs.map(double_copy))
    except CaptureError:
        raise
    except Exception as failure:
        raise not_runnable(model, inputs, failure) from failure
    found.with_data = True
    return found


@contextmanager
def without_data(model: nn.Module, inputs: Inputs) -> Iterator[tuple[nn.Module, Inputs]]:
    """Give a copy of the model and of its inputs, of the same shapes in float64, that hold no data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = copy_with(model, lambda _, tensor: _stand_in(tensor, fake))
    its_inputs = inputs.map(lambda tensor: _stand_in(tensor, fake))
    with fake, hushed():
        yield stand_in, its_inputs


def _stand_in(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    """Return a tensor of the same shape on the CPU that holds no data, a parameter for a parameter."""
    dtype = double_of(tensor.dtype)
    strides = tensor.stride() if tensor.layout is torch.strided else None
    if strides is None:
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    else:
        empty = torch.empty_strided(tensor.shape, strides, dtype=dtype, device="meta")
    stand_in = FakeTensor(fake, empty, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        stand_in._is_param = True
    return stand_in


def not_runnable(model: nn.Module, inputs: Inputs, failure: Exception) -> CaptureError:
    """Return the error that says that the original does not run on the inputs."""
    return CaptureError(
        f"{type(model).__name__} does not run on {inputs}: {type(failure).__name__}: {failure}\n"
        "Pass example_inputs that the model accepts."
    )


def _infer(model: nn.Module, inputs: Inputs) -> Inference:
    mode = LayoutInference()
    found = mode.found
    holders: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        first = holders.setdefault(id(tensor), name)
        if first == name:
            found.parameters[name] = mode.declare(
                tensor, [Axis(n) for n in tensor.shape], name
            ).layouts
            found.trainable.update([name] if isinstance(tensor, nn.Parameter) else [])
        found.names.setdefault(first, []).append(name)
    for position, tensor in enumerate(inputs.tensors()):
        name = f"input[{position}]"
        why = Reason("a dimension of the model's input", name)
        found.inputs[name] = mode.declare(
            tensor, [Axis(n, why) for n in tensor.shape], name
        ).layouts
    _run(model.eval(), inputs, mode)
    read = _read(found)
    read |= _follow_replaced(model, mode, read)
    if found.trainable - read and not isinstance(model, fx.GraphModule):
        read |= _read_in_training(model, inputs, mode)
    _fix_unused(found, read)
    fix_ranks(model, found.parameters, found.names)
    return found


def _run(model: nn.Module, inputs: Inputs, mode: LayoutInference) -> None:
    outputs = list(output_tensors(interpret(model, inputs, mode)))
    if not outputs:
        raise CaptureError(
            f"{type(model).__name__} returns no tensors that can be found; let it return tensors, or "
            "tuples, lists, dicts or dataclasses of them"
        )
    for name, tensor in outputs:
        value = mode.value_of(tensor)
        mode.found.outputs[name] = value.layouts
        mode.found.output_sources[name] = value.source
        maker = (
            mode.found.steps[value.source].place if isinstance(value.source, int) else Reason("")
        )
        why = Reason("a dimension of the model's output", name, maker.module, maker.source)
        for layout in value.layouts:
            fix(layout, why)


def _follow_replaced(model: nn.Module, mode: LayoutInference, read: set[str]) -> set[str]:
    """Describe attributes that the run replaced (masked weights, say) by what stands there now."""
    parameters, followed = mode.found.parameters, set()
    for name, tensor in named_tensors(model).items():
        now = mode.values.get(tensor)
        if now is None or name in read or now.source == name or name not in parameters:
            continue
        if list(map(size_of, now.layouts)) == list(map(size_of, parameters[name])):
            parameters[name] = now.layouts
            followed.add(name)
    return followed


def _read(found: Inference) -> set[str]:
    """Return the names of parameters, buffers and attributes that the recorded operators read."""
    sources = (value.source for step in found.steps for value in step.inputs)
    return {source for source in sources if isinstance(source, str)}


def _read_in_training(model: nn.Module, inputs: Inputs, mode: LayoutInference) -> set[str]:
    """Tie what only training reads (an auxiliary head, say) to its surroundings; return what is read.

    No step of this run is kept: the slim model is described and compared as it is in evaluation. A
    model that does not train on these inputs is left as it was found.
    """
    found = mode.found
    steps, unknown, outputs = len(found.steps), len(found.unknown), dict(found.outputs)
    sources = dict(found.output_sources)
    mode.in_training = True
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # it would refuse a single value a channel
            module.training = False
    try:
        _run(model, inputs, mode)
        return _read(found)
    except Exception:
        return set()
    finally:
        del found.steps[steps:], found.unknown[unknown:]
        found.outputs, found.output_sources = outputs, sources


def _fix_unused(found: Inference, read: set[str]) -> None:
    """Fix what no operator read: nothing is known of what it would have to fit."""
    for name, layouts in found.parameters.items():
        if name not in read:
            found.unused.append(name)
            for layout in layouts:
                fix(layout, Reason("not used in this run of the model", name))
