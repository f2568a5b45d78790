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
from graphprune.inference.other_sizes import all_lengths_vary, propose_inputs, reconcile
from graphprune.inference.precision import Precision
from graphprune.inference.reach import (
    collect_read_names,
    explain_unlike,
    find_dims_of_parameters,
    fix_parts_of_tables,
    fix_unread,
    fix_unused,
    reads_in_part,
)
from graphprune.inference.recorded import Inference, OtherRun, Step, Value
from graphprune.layout import Axis, Reason, fix, flatten_nesting, size_of
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
from graphprune.utils.torch_context import silence_torch

aten = torch.ops.aten

WHY_NO_RULE = "an operator without a rule"


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
        # Before the run: what changes a view in place (`transpose_`) changes these.
        strides = operands[0].stride() if operands else ()
        result = self.run(func, args, kwargs)
        outputs = list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))
        if not outputs:
            return result
        call_site = self.place(func)
        call = Call(func, arguments, self.layouts_of, outputs, call_site, strides, self.numbers_of)
        layouts = self._apply(rule, call)
        values = self._declare_results(call, layouts, inputs)
        # A copy of `[3, 0, 2, 1]` (`.to(device)`, `.clone()`) may be used as an order in its stead.
        if passes_numbers_on(func, outputs[0]):
            values[0].numbers = self.numbers_of(operands[0])
        # What the same buffer puts in order loses the same
        # slots: its numbers can be rewritten only once.
        for name, layout in call.addressed.items():
            if name:
                call.unify(self.found.addressed.setdefault(name, layout), layout)
        argument_values = pytree.tree_map_only(Tensor, self.value_of, arguments)
        node = "" if self.node is None else self.node.name
        self.found.steps.append(
            Step(
                func, call_site, inputs, values, argument_values,
                renormalises=call.renormalises, node=node, addresses=bool(call.addressed),
            )
        )  # fmt: skip
        return result

    def _declare_results(
        self, call: Call, layouts: list[Layouts], input_values: Sequence[Value]
    ) -> list[Value]:
        """Return what is known of the tensors that a call made, or of the one that it wrote over."""
        step_number = len(self.found.steps)
        changes_view = torch.Tag.inplace_view in call.func.tags
        if not (changes_view or is_in_place(call.func)):
            values = [
                self.declare(tensor, list(map(flatten_nesting, dims)), step_number)
                for tensor, dims in zip(call.outputs, layouts, strict=True)
            ]
            for index, asks in call.asks.items():
                values[index].asks.extend(asks)
            return values
        for asks in call.asks.values():
            for ask in asks:  # what is written over may be the model's own, which is read elsewhere
                ask()
        # `t_()` gives the tensor other dimensions; what
        # is only written over keeps those that it had.
        if changes_view:
            return [self.declare(call.tensors[0], layouts[0], step_number)]
        self._write_back(call, call.tensors[0], layouts)
        return [self._redeclare_written(call.tensors[0], input_values[0])]

    def higher_order(
        self, func: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operator that takes functions, and fix everything that goes in and comes out."""
        result = super().higher_order(func, args, kwargs)
        call_site = self.place(func)
        self.found.unknown.append(call_site)
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                for layout in self.read(leaf).layouts:
                    fix(
                        layout,
                        Reason(WHY_NO_RULE, call_site.operator, call_site.module, call_site.source),
                    )
        return result

    def _apply(self, rule: Rule | None, call: Call) -> list[Layouts]:
        is_random = torch.Tag.nondeterministic_seeded in call.func.tags
        if self.in_training and is_random and call.tensors:
            rule = pointwise.pointwise  # dropout: nothing is compared, so chance does no harm
        if rule is None:
            self.found.unknown.append(call.reason)
            return _fix_everything(call, WHY_NO_RULE)
        output_layouts = list(rule(call))
        shapes = [list(output.shape) for output in call.outputs]
        why = "a result that the rule does not describe"
        # A rule may leave out its last results (saved statistics, say): their dimensions are fixed.
        output_layouts += [
            [call.fixed(size, why) for size in shape] for shape in shapes[len(output_layouts) :]
        ]
        for index, shape in enumerate(shapes):
            if [size_of(layout) for layout in output_layouts[index]] != shape:
                if index == 0:
                    return _fix_everything(call, "a rule that does not fit this call")
                output_layouts[index] = [call.fixed(size, why) for size in shape]
        return output_layouts[: len(shapes)]

    def _write_back(self, call: Call, target: Tensor, layouts: list[Layouts]) -> None:
        for target_layout, written_layout in zip(self.layouts_of(target), layouts[0], strict=True):
            if size_of(target_layout) > 1:
                call.unify(target_layout, written_layout)

    def _redeclare_written(self, tensor: Tensor, old_value: Value) -> Value:
        """Return a tensor that was written over: it comes from there now, unless it is the model's own."""
        if isinstance(old_value.source, str):
            return old_value
        return self.declare(tensor, old_value.layouts, len(self.found.steps))

    def read_by_code(self, tensor: Tensor) -> None:
        """Take into account that the model's code looks at the values of a tensor."""
        self.read(tensor)

    def after_node(self, node: fx.Node, result: Any) -> None:
        """Keep the layouts of what a graph node gave."""
        self.found.nodes[node.name] = pytree.tree_map_only(Tensor, self.layouts_of, result)


def _fix_everything(call: Call, why: str) -> list[Layouts]:
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
    inference = _infer_once(model, inputs, with_data)
    if at_other_sizes or reads_in_part(inference):
        inference.others = _run_at_other_sizes(model, inputs, inference)
    return inference


def _infer_once(model: nn.Module, inputs: Inputs, with_data: bool) -> Inference:
    """Infer in float64, else in the model's own types; without data where that is allowed and works."""
    only_shapes = any(tensor.is_meta for tensor in named_tensors(model).values())
    data_choices = [True] if with_data else [False] if only_shapes else [False, True]
    # The last failure is the one that is shown: it happened in the model's own types.
    for precision in (Precision(), Precision(double=False)):
        for run_with_data in data_choices:
            try:
                return _infer_in(precision, model, inputs, run_with_data)
            except CaptureError:
                raise
            except Exception as error:
                failure = error
    raise not_runnable_error(model, inputs, failure) from failure


def _infer_in(precision: Precision, model: nn.Module, inputs: Inputs, with_data: bool) -> Inference:
    """Infer in one precision, on the model's real tensors or on tensors without data."""
    tensors = named_tensors(model).items()
    # Read here, since what stands in for the tensors holds no numbers.
    numbers_by_name = {name: numbers_in(name, tensor) for name, tensor in tensors}
    if not with_data:
        with make_stand_ins(model, inputs, precision) as (stand_in, stand_in_inputs):
            return _infer(stand_in, stand_in_inputs, LayoutInference(precision), numbers_by_name)
    real_model = copy_with(model, lambda _, tensor: precision.copy(tensor)).requires_grad_(False)
    mode = LayoutInference(precision, with_data=True)
    return _infer(real_model, inputs.map(precision.copy), mode, numbers_by_name)


@contextmanager
def make_stand_ins(
    model: nn.Module, inputs: Inputs, precision: Precision
) -> Iterator[tuple[nn.Module, Inputs]]:
    """Give a copy of the model and of its inputs, of the same shapes, that hold no data."""
    # The code may compute with real tensors that are no part of the model.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = copy_with(model, lambda _, tensor: _make_stand_in(tensor, fake, precision))
    stand_in_inputs = inputs.map(lambda tensor: _make_stand_in(tensor, fake, precision))
    with fake, silence_torch():
        yield stand_in, stand_in_inputs


def _make_stand_in(tensor: Tensor, fake: FakeTensorMode, precision: Precision) -> Tensor:
    """Return a tensor of the same shape on the CPU that holds no data, a parameter for a parameter."""
    dtype = precision.type_of(tensor.dtype)
    strides = tensor.stride() if tensor.layout is torch.strided else None
    if strides is None:
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    else:
        empty = torch.empty_strided(tensor.shape, strides, dtype=dtype, device="meta")
    stand_in = FakeTensor(fake, empty, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        # What `isinstance(stand_in, nn.Parameter)` looks at in tensors of other classes.
        stand_in._is_param = True
    return stand_in


def not_runnable_error(model: nn.Module, inputs: Inputs, failure: Exception) -> CaptureError:
    """Return the error that says that the original does not run on the inputs."""
    return CaptureError(
        f"{type(model).__name__} does not run on {inputs}: {type(failure).__name__}: {failure}\n"
        "Pass example_inputs that the model accepts."
    )


def _infer(
    model: nn.Module,
    inputs: Inputs,
    mode: LayoutInference,
    numbers_by_name: Mapping[str, Numbers | None],
) -> Inference:
    inference = mode.found
    first_names: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        # Tied weights are one tensor under several names: the first stands for all.
        first_name = first_names.setdefault(id(tensor), name)
        if first_name == name:
            value = mode.declare(tensor, [Axis(size) for size in tensor.shape], name)
            value.numbers, inference.parameters[name] = numbers_by_name[name], value.layouts
            inference.trainable.update([name] if isinstance(tensor, nn.Parameter) else [])
        inference.names.setdefault(first_name, []).append(name)
    for position, tensor in enumerate(inputs.tensors()):
        name = f"input[{position}]"
        why = Reason("a dimension of the model's input", name)
        inference.inputs[name] = mode.declare(
            tensor, [Axis(size, why) for size in tensor.shape], name
        ).layouts
    _run(model.eval(), inputs, mode)
    steps = list(inference.steps)
    read_names = collect_read_names(steps)
    read_names |= _follow_replaced(model, mode, read_names)
    # A graph module runs the same operators in training, so it would show nothing more.
    if inference.trainable - read_names and not isinstance(model, fx.GraphModule):
        training_steps, completed = _collect_training_steps(model, inputs, mode)
        inference.half_read = (
            set() if completed else collect_read_names(training_steps) - read_names
        )
        steps += training_steps
        read_names |= collect_read_names(training_steps)
    # An axis that is fixed keeps its reason, so the most telling come first.
    fix_unused(inference, read_names)
    fix_misread_orders(inference, steps)
    fix_ranks(model, inference.parameters, inference.names)
    fix_unread(inference, steps)
    return inference


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
        producer = (
            mode.found.steps[value.source].place if isinstance(value.source, int) else Reason("")
        )
        why = Reason("a dimension of the model's output", name, producer.module, producer.source)
        for layout in value.layouts:
            fix(layout, why)


def _follow_replaced(model: nn.Module, mode: LayoutInference, read_names: set[str]) -> set[str]:
    """Describe attributes that the run replaced (masked weights, say) by what stands there now."""
    parameters, followed = mode.found.parameters, set()
    for name, tensor in named_tensors(model).items():
        current_value = mode.values.get(tensor)
        if (
            current_value is None
            or name in read_names
            or current_value.source == name
            or name not in parameters
        ):
            continue
        if list(map(size_of, current_value.layouts)) == list(map(size_of, parameters[name])):
            parameters[name] = mode.read(tensor).layouts
            followed.add(name)
    return followed


def _collect_training_steps(
    model: nn.Module, inputs: Inputs, mode: LayoutInference
) -> tuple[list[Step], bool]:
    """Tie what only training reads (an auxiliary head, say) to its surroundings.

    Returns:
        Its operators, none of which is recorded: the slim model is described and compared as it is in
        evaluation. And whether the model trains on these inputs: these are all of them.

    """
    inference = mode.found
    step_count, unknown_count, outputs = (
        len(inference.steps),
        len(inference.unknown),
        dict(inference.outputs),
    )
    sources = dict(inference.output_sources)
    mode.in_training = True
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # it would refuse a single value a channel
            module.training = False
    try:
        _run(model, inputs, mode)
        return inference.steps[step_count:], True
    except Exception:
        return inference.steps[step_count:], False
    finally:
        # What stays of the run are the ties between layouts.
        del inference.steps[step_count:], inference.unknown[unknown_count:]
        inference.outputs, inference.output_sources = outputs, sources


# Sizes of the inputs that are tried in each direction at most, each by running the model without data.
_SIZES_TRIED = 5


def _run_at_other_sizes(model: nn.Module, inputs: Inputs, inference: Inference) -> list[OtherRun]:
    """Analyse the model at other sizes, where it takes any, and fix what is not alike in all runs."""
    tied_dims = find_dims_of_parameters(inference)
    candidates_by_direction = propose_inputs(inputs, tied_dims)
    precision = Precision(inference.in_double)
    runs = [
        _infer_on_first_accepted(precision, model, candidates, inference.with_data)
        for candidates in candidates_by_direction
    ]
    accepted_runs = [run for run in runs if run is not None]
    layouts_by_run = [
        {
            name: layouts
            for name, layouts in other_inference.parameters.items()
            if name not in other_inference.unknown_here
        }
        for _, other_inference in accepted_runs
    ]
    if not all_lengths_vary(
        inputs, [resized_inputs for resized_inputs, _ in accepted_runs], tied_dims
    ):
        fix_parts_of_tables(inference)
    axes_by_run = reconcile(
        inference.parameters, layouts_by_run, partial(explain_unlike, inference)
    )
    return [
        OtherRun(resized_inputs, other_inference, axes)
        for (resized_inputs, other_inference), axes in zip(accepted_runs, axes_by_run, strict=True)
    ]


def _infer_on_first_accepted(
    precision: Precision, model: nn.Module, candidates: Sequence[Inputs], with_data: bool
) -> tuple[Inputs, Inference] | None:
    for candidate in candidates[:_SIZES_TRIED]:
        try:
            return candidate, _infer_in(precision, model, candidate, with_data)
        except Exception:  # a model refuses sizes in whatever way it likes
            continue
    return None
