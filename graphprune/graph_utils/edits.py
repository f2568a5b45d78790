"""What passes do to the tensors of a graph: put some in, and take out those that nothing reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from graphprune.graph_utils.linear_layers import Layer, tensor_read_by


def put_parameter(graph_module: fx.GraphModule, name: str, value: Tensor, like: Tensor) -> None:
    """Hold a value as the parameter of that dotted name, trained or not as another one is."""
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)
    graph_module.get_submodule(owner).register_parameter(leaf, parameter)


def read_buffer(graph_module: fx.GraphModule, weight: str, leaf: str, value: Tensor) -> fx.Node:
    """Hold a value as a buffer beside a weight, and read it where nodes are being inserted."""
    owner, _, name = name_beside(graph_module, weight, leaf).rpartition(".")
    graph_module.get_submodule(owner).register_buffer(name, value)
    return graph_module.graph.get_attr(f"{owner}.{name}" if owner else name)


def read_packed(
    graph_module: fx.GraphModule, read: fx.Node, blocks: Tensor, places: Tensor
) -> tuple[fx.Node, fx.Node]:
    """Hold a packed matrix beside the parameter that a node reads, once for all readers, and read it."""
    weight = str(read.target)
    names = f"{weight}_blocks", f"{weight}_places"
    like, buffers = graph_module.get_parameter(weight), dict(graph_module.named_buffers())
    if names[1] not in buffers:
        owner, _, leaf = names[1].rpartition(".")
        put_parameter(graph_module, names[0], blocks, like)
        graph_module.get_submodule(owner).register_buffer(leaf, places)
    blocks_node, places_node = (graph_module.graph.get_attr(name) for name in names)
    return blocks_node, places_node


def put_bias(graph_module: fx.GraphModule, layer: Layer, bias: Tensor) -> None:
    """Give a layer that bias, in place of its own if it has one."""
    like = graph_module.get_parameter(str(layer.weight.target))
    if layer.bias is not None:
        put_parameter(graph_module, str(layer.bias.target), bias, like)
        return
    name = name_beside(graph_module, str(layer.weight.target), "bias")
    put_parameter(graph_module, name, bias, like)
    graph, node = graph_module.graph, layer.node
    with graph.inserting_before(node):
        read = graph.get_attr(name)
    # Convolutions and `linear` take a bias as an argument; a product of matrices has it added behind.
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "bias" in names:
        position = names.index("bias")
        node.args = (*node.args[:position], read, *node.args[position + 1 :])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        return
    with graph.inserting_after(node):
        total = graph.call_function(torch.ops.aten.add.Tensor, (node, read))
    total.meta = dict(node.meta)
    # The sum itself goes on reading the node.
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def rescale(
    graph_module: fx.GraphModule, layer: Layer, factor: Tensor | float, shift: Tensor | float
) -> None:
    """Have a layer give `factor * output + shift`; in float64, then rounded once.

    Args:
        graph_module: that holds the layer.
        layer: one of its layers.
        factor: a number, or `[channels]` of the output.
        shift: likewise.

    """
    # [groups, outputs, features]; factors and shifts are [groups * outputs], the output's channels.
    matrix = _matrix(layer, tensor_read_by(graph_module, layer.weight))
    factors, shifts = (
        torch.as_tensor(per_channel, dtype=torch.float64, device=matrix.device).expand(
            len(matrix[0]) * len(matrix)
        )
        for per_channel in (factor, shift)
    )
    _put_matrix(graph_module, layer, matrix * factors.reshape(*matrix.shape[:2], 1))
    if layer.bias or bool(shifts.any()):
        old_bias = tensor_read_by(graph_module, layer.bias).double() if layer.bias else 0.0
        put_bias(graph_module, layer, factors * old_bias + shifts)


def rescale_input(graph_module: fx.GraphModule, layer: Layer, factor: Tensor) -> None:
    """Have a layer give what it gives for `factor * input`, the factors being `[channels]` of the input."""
    matrix = _matrix(layer, tensor_read_by(graph_module, layer.weight))
    # [groups, inputs]; the features of an input are the entries of its window, one after the other.
    factors = factor.to(matrix).reshape(layer.groups, -1)
    window = matrix.shape[2] // factors.shape[1]
    _put_matrix(graph_module, layer, matrix * factors.repeat_interleave(window, 1).unsqueeze(1))


def shift_input(graph_module: fx.GraphModule, layer: Layer, shift: Tensor) -> None:
    """Have a layer that pads nothing give what it gives for `input + shift`, `[channels]` of the input."""
    matrix = _matrix(layer, tensor_read_by(graph_module, layer.weight))
    shifts = shift.to(matrix).reshape(layer.groups, -1)
    window = matrix.shape[2] // shifts.shape[1]
    # [groups, outputs, features] @ [groups, features, 1] -> [groups, outputs, 1]
    extra = matrix @ shifts.repeat_interleave(window, 1).unsqueeze(2)
    old_bias = tensor_read_by(graph_module, layer.bias).double() if layer.bias else 0.0
    put_bias(graph_module, layer, old_bias + extra.flatten())


def _matrix(layer: Layer, weight: Tensor) -> Tensor:
    return layer.matrix(weight, {"groups": layer.groups}).double()


def _put_matrix(graph_module: fx.GraphModule, layer: Layer, matrix: Tensor) -> None:
    name = str(layer.weight.target)
    weight = graph_module.get_parameter(name)
    value = layer.weight_like(weight, matrix, {"groups": layer.groups})
    put_parameter(graph_module, name, value, weight)


def name_beside(graph_module: fx.GraphModule, tensor: str, leaf: str) -> str:
    """Return a dotted name that nothing has, in the module that holds a tensor."""
    owner = tensor.rpartition(".")[0]
    return new_name(graph_module, f"{owner}.{leaf}" if owner else leaf)


def new_name(graph_module: fx.GraphModule, preferred: str) -> str:
    """Return a dotted name that nothing has: the preferred one, or that with a number."""
    owner, _, leaf = preferred.rpartition(".")
    module, number, name = graph_module.get_submodule(owner), 0, leaf
    # A bias that a module registered as None is a name that may be taken.
    while hasattr(module, name) and getattr(module, name) is not None:
        number += 1
        name = f"{leaf}_{number}"
    return f"{owner}.{name}" if owner else name


def drop_unread(graph_module: fx.GraphModule, names: Iterable[str]) -> None:
    """Take out those of the named tensors that no operator reads, and modules that hold nothing then."""
    graph = graph_module.graph
    for name in names:
        reads = [node for node in graph.find_nodes(op="get_attr") if node.target == name]
        if any(node.users for node in reads):
            continue
        for node in reads:
            graph.erase_node(node)
        owner, _, leaf = name.rpartition(".")
        module = graph_module.get_submodule(owner)
        if isinstance(getattr(module, leaf, None), Tensor):
            delattr(module, leaf)
        while owner and _is_empty(module):
            graph_module.delete_submodule(owner)
            owner = owner.rpartition(".")[0]
            module = graph_module.get_submodule(owner)


def _is_empty(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return not (list(module.children()) or any(isinstance(t, torch.Tensor) for t in tensors))
