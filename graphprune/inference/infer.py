"""From a model and example inputs to the layouts of every tensor: the rules, run over the operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from graphprune.errors import CaptureError
from graphprune.inference.adapters import fix_ranks
from graphprune.inference.interpreter import Interpretation, interpret
from graphprune.inference.orders import fix_misread_orders, numbers_in, passes_numbers_on
from graphprune.inference.other_sizes import all_lengths_vary, other_inputs, reconcile
from graphprune.inference.precision import Precision
from graphprune.inference.reach import (
    fix_parts_of_tables,
    fix_unread,
    fix_unused,
    names_read,
    reads_in_part,
    tied_to_parameters,
    why_not_alike,
)
from graphprune.inference.recorded import Inference, OtherRun, Step, Value
from graphprune.layout import Axis, Reason, fix, flattened, size_of
from graphprune.rules import (
    Call,
    Layouts,
    Numbers,
    Rule,
    bind_arguments,
    is_in_place,
    pointwise,
    tensors_in,
)
from graphprune.utils.inputs import Inputs, output_tensors
from graphprune.utils.tensors import copy_with, named_tensors
from graphprune.utils.torch_context import hushed

aten = torch.ops.aten

UNKNOWN = "an operator without a rule"


class LayoutInference(Interpretation):
    """Gives every tensor its layouts by the rule of the operator that makes it."""

    def __init__(self, precision: Precision | None = None, *, with_data: bool = False) -> None:
        super().__init__(precision)
        self.found = Inference(in_double=self.precision.double, with_data=with_data)
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

    def read(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor that something reads, once that is taken into account."""
        value = self.value_of(tensor)
        while value.asks:
            value.asks.pop()()
        return value

    def layouts_of(self, tensor: Tensor) -> Layouts:
        """Return the layouts of a tensor."""
        return self.value_of(tensor).layouts

    def numbers_of(self, tensor: Tensor) -> Numbers | None:
        """Return what a tensor holds: the model's own numbers, or those that stand in its code.

        Where the code sees data, numbers in it may follow from these.
        """
        value = self.value_of(tensor)
        if value.source == "constant" and not self.found.with_data:
            value.numbers = numbers_in("", tensor)
        return value.numbers

    def step(self, func: OpOverload, rule: Rule | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the operator, apply its rule and record both."""
        arguments = bind_arguments(func, args, kwargs)
        operands = list(tensors_in(arguments.values()))
        inputs = [self.read(tensor) for tensor in operands]
        strides = operands[0].stride() if operands else ()
        result = self.run(func, args, kwargs)
        outputs = list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))
        if not outputs:
            return result
        place = self.place(func)
        call = Call(func, arguments, self.layouts_of, outputs, place, strides, self.numbers_of)
        layouts = self._apply(rule, call)
        values = self._results(call, layouts, inputs)
        if passes_numbers_on(func, outputs[0]):
            values[0].numbers = self.numbers_of(operands[0])
        for name, layout in call.addressed.items():
            if name:
                call.unify(self.found.addressed.setdefault(name, layout), layout)
        recorded = pytree.tree_map_only(Tensor, self.value_of, arguments)
        node = "" if self.node is None else self.node.name
        self.found.steps.append(
            Step(
                func, place, inputs, values, recorded,
                renormalises=call.renormalises, node=node, addresses=bool(call.addressed),
            )
        )  # fmt: skip
        return result

    def _results(self, call: Call, layouts: list[Layouts], before: Sequence[Value]) -> list[Value]:
        """Return what is known of the tensors that a call made, or of the one that it wrote over."""
        number = len(self.found.steps)
        changes_view = torch.Tag.inplace_view in call.func.tags
        if not (changes_view or is_in_place(call.func)):
            values = [
                self.declare(tensor, list(map(flattened, dims)), number)
                for tensor, dims in zip(call.outputs, layouts, strict=True)
            ]
            for index, asks in call.asks.items():
                values[index].asks.extend(asks)
            return values
        for asks in call.asks.values():
            for ask in asks:  # what is written over may be the model's own, which is read elsewhere
                ask()
        if changes_view:
            return [self.declare(call.tensors[0], layouts[0], number)]
        self._write_back(call, call.tensors[0], layouts)
        return [self._written(call.tensors[0], before[0])]

    def higher_order(
        self, func: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operator that takes functions, and fix everything that goes in and comes out."""
        result = super().higher_order(func, args, kwargs)
        place = self.place(func)
        self.found.unknown.append(place)
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                for layout in self.read(leaf).layouts:
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

    def read_by_code(self, tensor: Tensor) -> None:
        """Take into account that the model's code looks at the values of a tensor."""
        self.read(tensor)

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
def infer(
    model: nn.Module, inputs: Inputs, *, with_data: bool = False, at_other_sizes: bool = False
) -> Inference:
    """Return the layouts of a model's tensors, found by running it on tensors without data.

    Where the model's Python code asks for values (data-dependent control flow), it is run on its
    real tensors instead. Where it reads a part of a dimension, it is run once more, on inputs of
    other sizes, and what depends on these is fixed.

    Args:
        model: any module; it is not changed, and its weights are not read unless values are asked for.
        inputs: example inputs; only shapes and types matter, unless values are asked for.
        with_data: run it on its real tensors at once.
        at_other_sizes: run it once more in any case.

    Raises:
        CaptureError: the model does not run on the inputs.

    """
    found = _infer_once(model, inputs, with_data)
    if at_other_sizes or reads_in_part(found):
        found.others = _other_runs(model, inputs, found)
    return found


def _infer_once(model: nn.Module, inputs: Inputs, with_data: bool) -> Inference:
    """Infer in float64, else in the model's own types; without data where that is allowed and works."""
    only_shapes = any(tensor.is_meta for tensor in named_tensors(model).values())
    ways = [True] if with_data else [False] if only_shapes else [False, True]
    for precision in (Precision(), Precision(double=False)):
        for on_data in ways:
            try:
                return _infer_in(precision, model, inputs, on_data)
            except CaptureError:
                raise
            except Exception as error:
                failure = error
    raise not_runnable(model, inputs, failure) from failure


def _infer_in(precision: Precision, model: nn.Module, inputs: Inputs, with_data: bool) -> Inference:
    """Infer in one precision, on the model's real tensors or on tensors without data."""
    tensors = named_tensors(model).items()
    held = {name: numbers_in(name, tensor) for name, tensor in tensors}
    if not with_data:
        with without_data(model, inputs, precision) as (stand_in, its_inputs):
            return _infer(stand_in, its_inputs, LayoutInference(precision), held)
    real_model = copy_with(model, lambda _, tensor: precision.copy(tensor)).requires_grad_(False)
    mode = LayoutInference(precision, with_data=True)
    return _infer(real_model, inputs.map(precision.copy), mode, held)


@contextmanager
def without_data(
    model: nn.Module, inputs: Inputs, precision: Precision
) -> Iterator[tuple[nn.Module, Inputs]]:
    """Give a copy of the model and of its inputs, of the same shapes, that hold no data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = copy_with(model, lambda _, tensor: _stand_in(tensor, fake, precision))
    its_inputs = inputs.map(lambda tensor: _stand_in(tensor, fake, precision))
    with fake, hushed():
        yield stand_in, its_inputs


def _stand_in(tensor: Tensor, fake: FakeTensorMode, precision: Precision) -> Tensor:
    """Return a tensor of the same shape on the CPU that holds no data, a parameter for a parameter."""
    dtype = precision.type_of(tensor.dtype)
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


def _infer(
    model: nn.Module, inputs: Inputs, mode: LayoutInference, held: Mapping[str, Numbers | None]
) -> Inference:
    found = mode.found
    holders: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        first = holders.setdefault(id(tensor), name)
        if first == name:
            value = mode.declare(tensor, [Axis(n) for n in tensor.shape], name)
            value.numbers, found.parameters[name] = held[name], value.layouts
            found.trainable.update([name] if isinstance(tensor, nn.Parameter) else [])
        found.names.setdefault(first, []).append(name)
    for position, tensor in enumerate(inputs.tensors()):
        name = f"input[{position}]"
        why = Reason("a dimension of the model's input", name)
        found.inputs[name] = mode.declare(
            tensor, [Axis(n, why) for n in tensor.shape], name
        ).layouts
    _run(model.eval(), inputs, mode)
    steps = list(found.steps)
    read = names_read(steps)
    read |= _follow_replaced(model, mode, read)
    if found.trainable - read and not isinstance(model, fx.GraphModule):
        in_training, trains = _steps_in_training(model, inputs, mode)
        found.half_read = set() if trains else names_read(in_training) - read
        steps += in_training
        read |= names_read(in_training)
    fix_unused(found, read)
    fix_misread_orders(found, steps)
    fix_ranks(model, found.parameters, found.names)
    fix_unread(found, steps)
    return found


def _run(model: nn.Module, inputs: Inputs, mode: LayoutInference) -> None:
    outputs = list(output_tensors(interpret(model, inputs, mode)))
    if not outputs:
        raise CaptureError(
            f"{type(model).__name__} returns no tensors that can be found; let it return tensors, or "
            "tuples, lists, dicts or dataclasses of them"
        )
    for name, tensor in outputs:
        value = mode.read(tensor)
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
            parameters[name] = mode.read(tensor).layouts
            followed.add(name)
    return followed


def _steps_in_training(
    model: nn.Module, inputs: Inputs, mode: LayoutInference
) -> tuple[list[Step], bool]:
    """Tie what only training reads (an auxiliary head, say) to its surroundings.

    Returns:
        Its operators, none of which is recorded: the slim model is described and compared as it is in
        evaluation. And whether the model trains on these inputs: these are all of them.

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
        return found.steps[steps:], True
    except Exception:
        return found.steps[steps:], False
    finally:
        del found.steps[steps:], found.unknown[unknown:]
        found.outputs, found.output_sources = outputs, sources


# Sizes of the inputs that are tried in each direction at most, each by running the model without data.
_SIZES_TRIED = 5


def _other_runs(model: nn.Module, inputs: Inputs, found: Inference) -> list[OtherRun]:
    """Analyse the model at other sizes, where it takes any, and fix what is not alike in all runs."""
    tied = tied_to_parameters(found)
    candidates = other_inputs(inputs, tied)
    precision = Precision(found.in_double)
    runs = [_first_that_runs(precision, model, some, found.with_data) for some in candidates]
    others = [run for run in runs if run is not None]
    read = [
        {name: x for name, x in second.parameters.items() if name not in second.unknown_here}
        for _, second in others
    ]
    if not all_lengths_vary(inputs, [there for there, _ in others], tied):
        fix_parts_of_tables(found)
    partners = reconcile(found.parameters, read, partial(why_not_alike, found))
    return [
        OtherRun(there, second, axes)
        for (there, second), axes in zip(others, partners, strict=True)
    ]


def _first_that_runs(
    precision: Precision, model: nn.Module, candidates: Sequence[Inputs], with_data: bool
) -> tuple[Inputs, Inference] | None:
    for candidate in candidates[:_SIZES_TRIED]:
        try:
            return candidate, _infer_in(precision, model, candidate, with_data)
        except Exception:  # a model refuses sizes in whatever way it likes
            continue
    return None
