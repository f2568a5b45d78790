"""Make constants, and arithmetic with them, part of the layers beside them."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphprune.graph_utils.constant_inputs import names_written_by, pads
from graphprune.graph_utils.edits import (
    drop_unread,
    new_name,
    put_parameter,
    rescale,
    rescale_input,
    shift_input,
)
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.rules import arguments_of, writes
from graphprune.utils.tensors import evaluation_mode

aten = torch.ops.aten

_SCALING = (aten.mul, aten.div)
_SHIFTING = (aten.add, aten.sub, aten.rsub)


@dataclass(frozen=True)
class AbsorbConstants(Pass):
    """What is computed from parameters and numbers alone is computed once, and goes into layers.

    1. Values that are computed from parameters and buffers alone (a weight that is normalised, masked or
       transposed) become parameters, where they take no more memory than what they are computed from.
    2. A layer's output that is multiplied, divided, added to or subtracted from, by a number or by one
       number a channel: the layer's weight and bias do it.
    3. The same of its input; sums only where the layer pads nothing.

    The graph is for inference. In float64, then rounded once.

    Left alone: values and weights that something else reads too, in-place arithmetic, buffers that the
    model writes to, constants that vary along other dimensions than the channels, and what would change
    the type of a result.
    """

    def rewrite(self, program: Program) -> bool:
        """Compute constants, then let layers take up what stands beside them until nothing does."""
        graph_module = program.graph_module
        changed = compute_constants(graph_module)
        while _absorb_one(graph_module):
            changed = True
        return changed


# ------------------------------------------------------------------- values of parameters alone


def compute_constants(graph_module: fx.GraphModule) -> bool:
    """Put what is computed from held tensors alone in the place of its computation, if there is any."""
    graph = graph_module.graph
    constant: set[fx.Node] = set()
    written = names_written_by(graph_module)
    for node in graph.nodes:
        if node.op == "get_attr":
            is_tensor = isinstance(attrgetter(str(node.target))(graph_module), Tensor)
            is_constant = is_tensor and node.target not in written
        else:
            sources = node.all_input_nodes
            is_constant = bool(sources) and constant.issuperset(sources) and _is_plain(node)
        if is_constant:
            constant.add(node)
    ends = [n for n in graph.nodes if n in constant and n.op != "get_attr"]
    # Where constants end: `w * mask` in `linear(x, (w * mask).t())` is a step, its transpose an end.
    ends = [node for node in ends if any(reader not in constant for reader in node.users)]
    with evaluation_mode(graph_module), torch.no_grad():
        computed: dict[fx.Node, Any] = {}
        values = {node: _value(graph_module, node, computed) for node in ends}
    small_values = {
        n: v for n, v in values.items() if isinstance(v, Tensor) and _is_small(graph_module, n, v)
    }
    for node, value in small_values.items():
        _hold(graph_module, node, value)
    return bool(small_values)


def _is_small(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> bool:
    """Say whether a floating-point value takes no more memory than what it is computed from."""
    source_tensors = [tensor_read_by(graph_module, source) for source in _sources(node)]
    source_bytes = sum(tensor.numel() * tensor.element_size() for tensor in source_tensors)
    return value.is_floating_point() and value.numel() * value.element_size() <= source_bytes


def _is_plain(node: fx.Node) -> bool:
    """Say whether a call of an operator gives the same whenever it is made."""
    if not isinstance(node.target, OpOverload) or writes(node):
        return False
    schema, tags = node.target._schema, node.target.tags
    return not (schema.is_mutable or torch.Tag.nondeterministic_seeded in tags)


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the held tensors that a value is computed from."""
    sources: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.op == "get_attr":
            sources[current] = None
        waiting += current.all_input_nodes
    return list(sources)


def _value(graph_module: fx.GraphModule, node: fx.Node, computed: dict[fx.Node, Any]) -> Any:
    if node not in computed:
        if node.op == "get_attr":
            computed[node] = tensor_read_by(graph_module, node)
        else:
            for source in node.all_input_nodes:
                _value(graph_module, source, computed)
            args, kwargs = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
            computed[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return computed[node]


def _hold(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Hold a value as a parameter beside the first it was computed from, and read it instead."""
    sources = _sources(node)
    first_source = str(sources[0].target)
    # Of `conv.parametrizations.weight.original0`, the value becomes `conv.weight`.
    owner, is_parametrized, _ = first_source.partition(".parametrizations.")
    if not is_parametrized:
        owner = first_source.rpartition(".")[0]
    preferred = f"{owner}.{_role(node)}" if owner else _role(node)
    name = new_name(graph_module, preferred)
    module = graph_module.get_submodule(owner)
    is_trained = any(attrgetter(str(s.target))(graph_module).requires_grad for s in sources)
    like = torch.empty(0, dtype=value.dtype, requires_grad=is_trained)
    put_parameter(graph_module, name, value.clone().contiguous(), like)
    with graph_module.graph.inserting_before(node):
        read = graph_module.graph.get_attr(name)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    graph_module.graph.eliminate_dead_code()
    drop_unread(graph_module, [str(source.target) for source in sources])
    # What had the name may have been read by the computation alone, and is gone with it.
    if name != preferred and not hasattr(module, preferred.rpartition(".")[2]):
        put_parameter(graph_module, preferred, tensor_read_by(graph_module, read), like)
        read.target = preferred
        delattr(module, name.rpartition(".")[2])


def _role(node: fx.Node) -> str:
    """Return what the first operator that reads a value calls it."""
    reader = next(iter(node.users))
    if not isinstance(reader.target, OpOverload):
        return "constant"
    arguments = arguments_of(reader)
    role = next((name for name, argument in arguments.items() if argument is node), "constant")
    return role if role in ("weight", "bias") else "constant"


# ------------------------------------------------------------- arithmetic before and after layers


def _absorb_one(graph_module: fx.GraphModule) -> bool:
    """Let one layer take up one operator beside it; say whether there was one."""
    for layer in layers_of(graph_module).values():
        behind = _find_behind(graph_module, layer)
        if behind is not None:
            rescale(graph_module, layer, behind.factor, behind.shift)
            _bypass(graph_module, behind)
            return True
        before = _find_before(graph_module, layer)
        if before is not None:
            # The shift first, with the weight as it is: W (f x + s) = (W f) x + W s.
            if before.shift.any():
                shift_input(graph_module, layer, before.shift)
            rescale_input(graph_module, layer, before.factor)
            _bypass(graph_module, before)
            return True
    return False


@dataclass(frozen=True)
class _Arithmetic:
    """An operator that gives `factor * value + shift`, both `[channels]`."""

    node: fx.Node
    value: fx.Node
    factor: Tensor
    shift: Tensor


def _find_behind(graph_module: fx.GraphModule, layer: Layer) -> _Arithmetic | None:
    """Return the arithmetic that alone reads a layer's output, where the layer can do it."""
    readers = list(layer.node.users)
    if len(readers) != 1:
        return None
    dim = 1 if layer.summed == 1 else -1
    arithmetic = _arithmetic(graph_module, readers[0], layer.node, dim)
    return (
        arithmetic
        if arithmetic is not None and (_takes_bias(layer) or not arithmetic.shift.any())
        else None
    )


def _find_before(graph_module: fx.GraphModule, layer: Layer) -> _Arithmetic | None:
    """Return the arithmetic whose result a layer alone reads, where the layer can do it."""
    if list(layer.data.users) != [layer.node]:
        return None
    for value in layer.data.all_input_nodes:
        arithmetic = _arithmetic(graph_module, layer.data, value, layer.summed)
        if arithmetic is not None and not arithmetic.shift.any():
            return arithmetic
        if arithmetic is not None and _takes_bias(layer) and not pads(arguments_of(layer.node)):
            return arithmetic
    return None


def _takes_bias(layer: Layer) -> bool:
    """Say whether a bias is part of the layer's own call."""
    return layer.bias is not None or "bias" in arguments_of(layer.node)


def _arithmetic(
    graph_module: fx.GraphModule, node: fx.Node, value: fx.Node, dim: int
) -> _Arithmetic | None:
    """Return what a node does to a value, channel by channel, if that is all it does."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in (*_SCALING, *_SHIFTING) or writes(node):
        return None
    arguments = arguments_of(node)
    is_left, is_right = (arguments[name] is value for name in ("self", "other"))
    if is_left == is_right or arguments.get("rounding_mode") is not None:
        return None
    input_value, output_value = value.meta.get("val"), node.meta.get("val")
    if input_value is None or output_value is None or not input_value.dtype.is_floating_point:
        return None
    if (input_value.shape, input_value.dtype) != (output_value.shape, output_value.dtype):
        return None
    constant = _by_channel(
        graph_module, arguments["other" if is_left else "self"], input_value, dim
    )
    if constant is None or (packet is aten.div and is_right):
        return None
    ones, zeros = torch.ones_like(constant), torch.zeros_like(constant)
    if packet in _SCALING:
        return _Arithmetic(node, value, constant if packet is aten.mul else 1 / constant, zeros)
    alpha = float(arguments.get("alpha", 1))
    sign = 1 if packet is aten.add else -1
    # alpha multiplies the second operand, of rsub the first
    if is_left if packet is aten.rsub else is_right:
        return _Arithmetic(node, value, sign * alpha * ones, constant)
    return _Arithmetic(node, value, ones, sign * alpha * constant)


def _by_channel(
    graph_module: fx.GraphModule, constant: Any, value: Tensor, dim: int
) -> Tensor | None:
    """Return a constant as one number a channel, or None where it is no such thing."""
    channels = int(value.shape[dim])
    if isinstance(constant, (int, float)):
        return torch.full((channels,), float(constant), dtype=torch.float64)
    if not isinstance(constant, fx.Node) or constant.op != "get_attr":
        return None
    if constant.target in names_written_by(graph_module):
        return None
    tensor = tensor_read_by(graph_module, constant).double()
    if tensor.dim() > value.dim():
        return None
    # Broadcast from the right: `[channels, 1, 1]` beside `[batch, channels, *space]` gets a 1 in front.
    tensor = tensor.reshape([1] * (value.dim() - tensor.dim()) + list(tensor.shape))
    by_channel = tensor.movedim(dim, 0)  # [channels or 1, 1, ...], where it varies along no other
    if by_channel.numel() not in (1, channels) or by_channel.numel() != by_channel.shape[0]:
        return None
    return by_channel.flatten().expand(channels).clone()


def _bypass(graph_module: fx.GraphModule, arithmetic: _Arithmetic) -> None:
    node = arithmetic.node
    constant_names = [
        str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"
    ]
    node.replace_all_uses_with(arithmetic.value)
    graph_module.graph.erase_node(node)
    drop_unread(graph_module, constant_names)
