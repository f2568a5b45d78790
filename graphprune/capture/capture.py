"""From a model and example inputs to a graph in one dialect; the only place that traces."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.distributed.wrappers import unwrap
from graphprune.errors import CaptureError, InvalidRequestError, in_a_line
from graphprune.inference.precision import find_coarsest_dtype, relative_difference, tolerance_of
from graphprune.utils.inputs import Inputs, call, output_tensors
from graphprune.utils.lru_caches import without_caches
from graphprune.utils.tensors import check_not_quantised, copy_with, named_tensors, working_copy
from graphprune.utils.torch_context import (
    fixed_seed,
    fused_modules,
    one_thread_at_a_time,
    reference_kernels,
    silence_torch,
    warn_of_fused,
)

aten = torch.ops.aten

# Sizes of images that published networks take.
_IMAGE_SIZES = (224, 32, 28, 64, 128, 256, 299, 384)
_SEQUENCE_LENGTHS = (16, 64, 128, 512)
_BATCH = 2

# A size in a traced graph that takes more operations than this to compute is not left free. Plain
# convolutional networks need up to 10 (DenseNet), those that cut images into windows 80 and more.
_MAX_OPERATIONS = 40

# Tracing with free sizes is given up where it takes longer than this, in seconds of this thread: in all, or
# for each operator on average once the first seconds are over. With fixed sizes one takes about 0.005.
_PATIENCE = 120.0
_FIRST_SECONDS = 5.0
_SECONDS_AN_OPERATOR = 0.05


def normalize_model_and_inputs(model: Any, example_inputs: Any) -> tuple[nn.Module, Inputs]:
    """Return the module to work on and its inputs, once both are known to make sense.

    A model in DistributedDataParallel is the one inside; of a sharded one it is a whole copy.

    Raises:
        InvalidRequestError: the model is not one, or holds nothing.
        CaptureError: no inputs were given and none that were tried fit.

    """
    if isinstance(model, ExportedProgram):
        program_inputs = model.example_inputs
        if example_inputs is None and program_inputs is not None:
            example_inputs = Inputs(*program_inputs[0], **program_inputs[1])
        return to_trainable_graph(model), Inputs.of(example_inputs)
    if not isinstance(model, nn.Module):
        raise InvalidRequestError(
            "the model must be an nn.Module, an fx.GraphModule or a torch.export.ExportedProgram, "
            f"not {type(model).__name__}"
        )
    model = unwrap(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidRequestError(
                f"{name or 'the model'} is a TorchScript module, which has no Python code to trace; "
                "pass the nn.Module that it was made from"
            )
    check_not_quantised(model)
    if not named_tensors(model):
        raise InvalidRequestError(
            f"{type(model).__name__} holds no parameters, so there is nothing to cut"
        )
    if example_inputs is None:
        return model, guess_inputs(model)
    return model, Inputs.of(example_inputs)


def guess_inputs(model: nn.Module) -> Inputs:
    """Return inputs that the model runs on: an image, a vector, a sequence or token numbers.

    What is tried follows from the model's first layer; each is run on tensors without data.

    Raises:
        CaptureError: the model runs on none of them.

    """
    noted_inputs = _find_noted_inputs(model)
    if noted_inputs is not None:
        return noted_inputs
    tried: list[str] = []
    for inputs in _candidates(model):
        if _runs_without_data(model, inputs):
            return inputs
        tried.append(str(inputs))
    raise CaptureError(
        f"{type(model).__name__} needs example_inputs: "
        + (
            f"none of {', '.join(tried)} fits"
            if tried
            else "its first layer does not tell what they are"
        )
    )


def _find_noted_inputs(model: nn.Module) -> Inputs | None:
    """Return inputs of the shapes that a traced graph notes at its placeholders."""
    if not isinstance(model, fx.GraphModule):
        return None
    values = [node.meta.get("val") for node in model.graph.find_nodes(op="placeholder")]
    if not values or not all(isinstance(value, Tensor) for value in values):
        return None
    shapes = [([_hint(size) for size in value.shape], value.dtype) for value in values]
    return Inputs(
        *(
            torch.randn(s, dtype=d) if d.is_floating_point else torch.zeros(s, dtype=d)
            for s, d in shapes
        )
    )


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or _BATCH)


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Inputs:
        return Inputs(torch.randn(_BATCH, *shape, generator=generator))

    # the first layer of these kinds tells what the inputs are; modules of other kinds are passed over
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            for length in _SEQUENCE_LENGTHS:
                shape = (_BATCH, length)
                yield Inputs(torch.randint(module.num_embeddings, shape, generator=generator))
        elif isinstance(module, nn.modules.conv._ConvNd):
            rank = len(module.kernel_size)
            sizes = {1: _SEQUENCE_LENGTHS, 2: _IMAGE_SIZES, 3: (16, 32)}[rank]
            yield from (random(module.in_channels, *[size] * rank) for size in sizes)
        elif isinstance(module, nn.Linear):
            yield random(module.in_features)
            yield random(_SEQUENCE_LENGTHS[0], module.in_features)
        elif isinstance(module, nn.RNNBase):
            yield random(_SEQUENCE_LENGTHS[0], module.input_size)
        else:
            continue
        return


def _runs_without_data(model: nn.Module, inputs: Inputs) -> bool:
    with FakeTensorMode(allow_non_fake_inputs=True), without_caches(model):
        fake = copy_with(model, lambda _, t: torch.empty(t.shape, dtype=t.dtype)).eval()
        try:
            call(fake, inputs.map(lambda t: torch.empty(t.shape, dtype=t.dtype)))
        except Exception:
            return False
    return True


def capture(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return a graph of the model that gives what the model gives, checked on the inputs.

    The graph follows `.train()` and `.eval()`: dropout and batch norm read the module's own flag.

    Raises:
        CaptureError: the model cannot be traced, or the graph gives something else.

    """
    with one_thread_at_a_time():
        if any(tensor.is_meta for tensor in named_tensors(model).values()):
            return _trace_without_data(model, inputs)
        return _trace_and_check(model, inputs)


def _trace_without_data(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Trace a model on the meta device as one on the CPU, where its inputs are and its result will run."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    meta_names = {name for name, tensor in named_tensors(model).items() if tensor.is_meta}
    with fake:
        # fake tensors, made within the mode: they say that they are on the CPU, and take no memory
        cpu_model = copy_with(
            model, lambda _, t: torch.empty_like(t, device="cpu") if t.is_meta else None
        )
        cpu_inputs = inputs.map(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    graph_module = _trace_and_check(cpu_model, cpu_inputs)
    return cast(
        fx.GraphModule,
        copy_with(
            graph_module,
            lambda name, t: torch.empty_like(t, device="meta") if name in meta_names else None,
        ),
    )


def _trace_and_check(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    eval_model = working_copy(model).eval()
    eval_model.forward = _drop_non_tensor_outputs(eval_model.forward)
    problems: list[str] = []
    reason = ""
    # from most free sizes to none; the first graph that gives what the model gives is taken
    for name, shapes, free in _shape_choices(inputs):
        trace_inputs = _repeat_to_two(inputs) if free else inputs
        try:
            with without_caches(model), reference_kernels(), silence_torch():
                with _SimpleSizes() if free else nullcontext():
                    program = torch.export.export(
                        eval_model,
                        trace_inputs.args,
                        trace_inputs.kwargs,
                        dynamic_shapes=shapes,
                        strict=False,
                    )
                graph_module = to_trainable_graph(program)
                _check_same(eval_model, graph_module, inputs, free)
        except Exception as failure:
            reason = in_a_line(failure)
            problems.append(f"  {name}: {reason}")
            continue
        _compare_with_fused(eval_model, graph_module, inputs)
        return graph_module
    raise CaptureError(
        f"{type(model).__name__} cannot be traced by torch.export: {reason}\n" + "\n".join(problems)
    )


class _SimpleSizes(TorchFunctionMode):
    """Gives up on tracing where sizes get so entangled that each operator would take seconds.

    Windows cut out of a padded image do so: every size is a quotient of quotients of the image's. Others
    stay short and have conditions that take as long to decide, which the clock tells.
    """

    def __init__(self) -> None:
        super().__init__()
        # of this thread, not of the wall: a busy machine must not change which sizes are free
        self.start = time.thread_time()
        self.operators = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._look_at_clock()
        result = func(*args, **(kwargs or {}))
        for size in result.shape if isinstance(result, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > _MAX_OPERATIONS:
                raise NotImplementedError(f"a size that takes over {_MAX_OPERATIONS} operations")
        return result

    def _look_at_clock(self) -> None:
        seconds = time.thread_time() - self.start
        self.operators += 1
        allowed = max(_FIRST_SECONDS, _SECONDS_AN_OPERATOR * self.operators)
        if seconds > min(allowed, _PATIENCE):
            raise TimeoutError(f"sizes that took {seconds:.0f} s for {self.operators} operators")


def is_aten_graph(model: nn.Module) -> bool:
    """Say whether the model is a graph that calls ATen operators alone, whose sizes can be rewritten."""
    if not isinstance(model, fx.GraphModule):
        return False
    return all(
        node.op not in ("call_module", "call_method")
        and (
            node.op != "call_function"
            or isinstance(node.target, OpOverload)
            or _is_arithmetic(node)
        )
        for node in model.graph.nodes
    )


def graph_of(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return the model itself if it is a graph of ATen operators, else a graph of it.

    Raises:
        CaptureError: the model cannot be traced.

    """
    return cast(fx.GraphModule, model) if is_aten_graph(model) else capture(model, inputs)


def _is_arithmetic(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")


def _shape_choices(inputs: Inputs) -> Iterator[tuple[str, Any, bool]]:
    """Yield what to leave free in tracing, from most to nothing."""
    batch_shape = inputs.tensors()[0].shape[:1] if inputs.tensors() else ()

    def shapes(dims_of: Any) -> Any:
        return pytree.tree_map(
            lambda leaf: dims_of(leaf) if isinstance(leaf, Tensor) else None,
            (tuple(inputs.args), dict(inputs.kwargs)),
        )

    if not inputs.kwargs or not inputs.args:
        yield (
            "all sizes free",
            _merge_shapes(*shapes(lambda t: dict.fromkeys(range(t.dim()), Dim.AUTO))),
            True,
        )
        yield (
            "batch free",
            _merge_shapes(*shapes(lambda t: {0: Dim.AUTO} if t.shape[:1] == batch_shape else {})),
            True,
        )
    yield "all sizes as given", None, False


def _repeat_to_two(inputs: Inputs) -> Inputs:
    """Return inputs of batch two where it was one: a size of one is taken for a constant."""
    first_tensor = inputs.tensors()[0]
    return inputs.repeat(2) if first_tensor.dim() and first_tensor.shape[0] == 1 else inputs


def _check_same(model: nn.Module, graph_module: fx.GraphModule, inputs: Inputs, free: bool) -> None:
    """Compare both on the kernels that were traced: fused ones may differ at padded positions."""
    if _has_no_data(model):
        return
    tolerance = _tolerance(model, inputs)
    # a free batch has to hold at another size too, unless the model itself does not run there
    for batch in (inputs, inputs.repeat(2)) if free else (inputs,):
        try:
            with fixed_seed():
                expected_outputs = list(output_tensors(call(model, batch)))
        except Exception:
            if batch is inputs:
                raise
            continue
        with fixed_seed():
            graph_outputs = list(output_tensors(call(graph_module, batch)))
        for (name, expected), (_, actual) in zip(expected_outputs, graph_outputs, strict=True):
            torch.testing.assert_close(
                actual,
                expected,
                rtol=tolerance,
                atol=tolerance * float(expected.abs().max() or 1) if expected.numel() else 0,
                equal_nan=True,
                msg=f"{name} of the graph differs from the model's",
            )


def difference_on(model: nn.Module, graph_module: fx.GraphModule, inputs: Inputs) -> str:
    """Return how a graph of a model differs from it on some inputs; "" where it does not.

    Inputs that the model itself does not take make no difference.
    """
    eval_model = working_copy(model).eval()
    with without_caches(model), reference_kernels(), silence_torch(), fixed_seed():
        try:
            call(eval_model, inputs)
        except Exception:
            return ""
        try:
            _check_same(eval_model, graph_module, inputs, free=False)
        except Exception as failure:
            return in_a_line(failure)
    return ""


def _has_no_data(model: nn.Module) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in named_tensors(model).values())


def _tolerance(model: nn.Module, inputs: Inputs) -> float:
    """Return the tolerance of the model: a graph repeats its operators, at most in another order."""
    return tolerance_of(find_coarsest_dtype([*named_tensors(model).values(), *inputs.tensors()]))


def _compare_with_fused(model: nn.Module, graph_module: fx.GraphModule, inputs: Inputs) -> None:
    """Warn where the model as it evaluates takes a fast path that gives something else."""
    if not fused_modules(model) or _has_no_data(model):
        return
    with silence_torch(), fixed_seed():
        # without `reference_kernels`, as the user's own call runs it
        fused_outputs = list(output_tensors(call(model, inputs)))
    with fixed_seed():
        graph_outputs = list(output_tensors(call(graph_module, inputs)))
    gaps = [
        relative_difference(*(tensor.double().numpy(force=True) for tensor in pair))
        for pair in ((a, b) for (_, a), (_, b) in zip(fused_outputs, graph_outputs, strict=True))
        if pair[0].is_floating_point()
    ]
    if max(gaps, default=0.0) > _tolerance(model, inputs):
        warn_of_fused(model, "the graph", max(gaps))


def _drop_non_tensor_outputs(forward: Any) -> Any:
    """Return the forward with everything but tensors in containers left out of its result."""

    @functools.wraps(forward)
    def plain_forward(*args: Any, **kwargs: Any) -> Any:
        return _drop_non_tensors(forward(*args, **kwargs))

    return plain_forward


def _drop_non_tensors(output: Any) -> Any:
    if isinstance(output, Tensor) or output is None:
        return output
    if isinstance(output, Mapping):
        # built by keywords below, as the outputs of transformers want: mappings and dataclasses at once
        kept = {
            key: value
            for key, value in ((k, _drop_non_tensors(v)) for k, v in output.items())
            if value is not None
        }
        by_keywords = type(output) is not dict and all(isinstance(key, str) for key in kept)
        return type(output)(**kept) if by_keywords else kept
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_drop_non_tensors, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(_drop_non_tensors, output))
    if dataclasses.is_dataclass(output):
        return {
            field.name: _drop_non_tensors(getattr(output, field.name))
            for field in dataclasses.fields(output)
        }
    return None


def to_trainable_graph(program: ExportedProgram) -> fx.GraphModule:
    """Return an exported program as a graph module that trains, moves, copies and pickles."""
    module = program.module(check_guards=False)
    graph = copy.deepcopy(module.graph)
    graph._tracer_cls = None  # the module would remember it, and could not be read back
    graph_module = fx.GraphModule(module, graph)
    graph._codegen = module.graph._codegen
    _drop_assertions(graph_module.graph)
    _follow_device(graph_module.graph)
    follow_training(graph_module)
    return graph_module.eval()


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove the tracer's notes of dtype and device, which would keep the graph from moving."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)


_MADE_LIKE = {
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
    aten.full.default: aten.new_full.default,
}


def _follow_device(graph: fx.Graph) -> None:
    """Make tensors where the first input is, if they were made there: the tracer wrote its device down.

    What is made of the sizes of an input could not be pickled otherwise, either.
    """
    inputs = graph.find_nodes(op="placeholder")
    device_source = next(
        (node for node in inputs if isinstance(node.meta.get("val"), Tensor)), None
    )
    if device_source is None:
        return
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target not in _MADE_LIKE or value.device != device_source.meta["val"].device:
            continue
        fill = node.args[1:2] if node.target is aten.full.default else ()
        with graph.inserting_before(node):
            new_node = graph.call_function(
                _MADE_LIKE[node.target],
                (device_source, node.args[0], *fill),
                {"dtype": value.dtype},
            )
        new_node.meta = dict(node.meta)
        node.replace_all_uses_with(new_node)
        graph.erase_node(node)


def reexport(original: ExportedProgram, slimmer: nn.Module, example_inputs: Any) -> ExportedProgram:
    """Return a slim graph as an exported program with the original's free sizes."""
    inputs = normalize_model_and_inputs(original, example_inputs)[1]
    placeholder_values = [node.meta["val"] for node in original.graph.find_nodes(op="placeholder")]
    user_input_names = {
        spec.arg.name
        for spec in original.graph_signature.input_specs
        if spec.kind.name == "USER_INPUT"
    }
    names = [node.name for node in original.graph.find_nodes(op="placeholder")]
    remaining_values = iter(
        [
            value
            for name, value in zip(names, placeholder_values, strict=True)
            if name in user_input_names
        ]
    )

    def shape(leaf: Any) -> Any:
        # for each leaf, tensor or not: leaves come in the order of the placeholders
        placeholder_value = next(remaining_values)
        if not isinstance(leaf, Tensor):
            return None
        return {
            d: Dim.AUTO
            for d, size in enumerate(placeholder_value.shape)
            if not isinstance(size, int)
        }

    args, kwargs = pytree.tree_map(shape, (tuple(inputs.args), dict(inputs.kwargs)))
    with silence_torch():
        return torch.export.export(
            slimmer.eval(),
            tuple(inputs.args),
            dict(inputs.kwargs),
            dynamic_shapes=_merge_shapes(args, kwargs),
            strict=False,
        )


def _merge_shapes(args: Any, kwargs: Any) -> Any:
    """Return the dynamic shapes of positional and keyword arguments as torch.export takes them."""
    return (
        {**{str(i): shape for i, shape in enumerate(args)}, **kwargs}
        if args and kwargs
        else args or kwargs
    )


_TRAINING_ARGUMENTS = ("train", "training")


def follow_training(graph_module: fx.GraphModule) -> None:
    """Make dropout, batch norm and recurrent operators read the module's `training` flag."""
    graph = graph_module.graph
    flag: fx.Node | None = None
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema else ()):
            argument_value = node.args[position] if position < len(node.args) else None
            # traced in evaluation: the module's own flag was written down as False; True was asked for
            if argument.name in _TRAINING_ARGUMENTS and argument_value is False:
                if flag is None:
                    flag = _insert_training_flag(graph)
                node.update_arg(position, flag)
    graph_module.recompile()


def _insert_training_flag(graph: fx.Graph) -> fx.Node:
    first_node = next(iter(graph.nodes))
    # torch.fx warns since `training` is neither a parameter nor a buffer nor a module
    with graph.inserting_before(first_node), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return graph.create_node("get_attr", "training", name="training")
