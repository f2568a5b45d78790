"""Layers that are linear in a weight, seen as a product of a matrix and features of the input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphprune.rules import arguments_of
from graphprune.utils.tensors import parameter_names

aten = torch.ops.aten

# Features of convolutions are written out at most this much at a time.
_FEATURE_BYTES = 256 << 20


@dataclass(frozen=True)
class Layer(ABC):
    """A node of a graph that computes `weight * input + bias`.

    Attributes:
        node: the call.
        data: the node that gives its input.
        weight: the node that reads its weight.
        bias: the node that reads its bias, or None.
        summed: the dimension of the input over which it sums.

    """

    summed: ClassVar[int]
    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for other layers."""
        node = self.node
        arguments = arguments_of(node)
        groups: int = arguments.get("groups", 1)
        return groups

    @property
    def channels_are_second(self) -> bool:
        """Whether the channels of its output are dimension 1, as batch norms take them."""
        value = self.node.meta.get("val")
        return self.summed == 1 or (isinstance(value, Tensor) and value.dim() == 2)

    def arguments(self, values: Mapping[fx.Node, Any]) -> dict[str, Any]:
        """Return the call's other arguments by name, computed ones by their values."""
        node = self.node
        call_arguments = arguments_of(node)
        return {
            name: fx.map_arg(argument, values.__getitem__)
            for name, argument in call_arguments.items()
            if argument not in (self.data, self.weight, self.bias)
        }

    def value(
        self, data: Tensor, weight: Tensor, bias: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        """Return what the layer gives for an input, with such a weight and bias."""
        keywords = {**arguments, "input": data, "weight": weight, "bias": bias}
        result: Tensor = self.node.target(**keywords)  # type: ignore[operator]
        return result

    def products(
        self, data: Tensor, output: Tensor, weight: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """Return the sum over samples of an output times the features, `[groups, outputs, features]`.

        It is the gradient of a weight whose output has that gradient; in single precision at least, for
        sums over samples soon exceed the largest number of half precision.
        """
        precise = torch.promote_types(weight.dtype, torch.float32)
        # Of sum(output * (W f)), the gradient in W is the sum over samples of output f'.
        with torch.enable_grad():
            leaf_weight = weight.to(precise, copy=True).requires_grad_()
            value = self.value(data.to(precise), leaf_weight, None, arguments)
            (gradient,) = torch.autograd.grad(value, leaf_weight, output.to(value.dtype))
        return self.matrix(gradient, arguments).double()

    @staticmethod
    def pieces(data: Tensor, weight: Tensor) -> Iterator[slice]:
        """Yield slices of an input's first dimension, two at least, whose features are not too large."""
        # A convolution's features are its input once for each entry of the window.
        sample_bytes = data[:1].numel() * weight[0, 0].numel() * data.element_size()
        step = min(max(1, _FEATURE_BYTES // max(sample_bytes, 1)), max(1, len(data) // 2))
        yield from (slice(start, start + step) for start in range(0, len(data), step))

    @abstractmethod
    def features(self, data: Tensor, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return what each output is a weighted sum of, `[groups, samples, features]`."""

    def takes(self, weight: Tensor) -> bool:
        """Say whether the weight has a shape that the layer knows."""
        return weight.dim() >= 2

    @abstractmethod
    def fan_in(self, weight: Tensor) -> int:
        """Return how many entries of the input each output is made of."""

    @abstractmethod
    def samples(self, output: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return an output of the layer as `[groups, samples, outputs]`."""

    @abstractmethod
    def matrix(self, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the weight as `[groups, outputs, features]`."""

    @abstractmethod
    def weight_like(self, weight: Tensor, matrix: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return such a matrix in the shape of the weight."""


class LinearLayer(Layer):
    """`aten.linear`: the features are the input's last dimension."""

    summed = -1

    def fan_in(self, weight: Tensor) -> int:
        """Return the length of the input's vectors."""
        return weight.shape[1]

    def features(self, data: Tensor, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the input's vectors."""
        return data.reshape(1, -1, data.shape[-1])

    def samples(self, output: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the output's vectors."""
        return output.reshape(1, -1, output.shape[-1])

    def matrix(self, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the weight, which is a matrix."""
        return weight.unsqueeze(0)

    def weight_like(self, weight: Tensor, matrix: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the one matrix."""
        return matrix.squeeze(0)


class MatrixLayer(LinearLayer):
    """`aten.addmm`, `aten.mm` and `aten.matmul`: a linear layer whose weight is `[inputs, outputs]`."""

    def value(
        self, data: Tensor, weight: Tensor, bias: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        """Return the product, and the bias added to it."""
        product = data @ weight
        return product if bias is None else product + bias

    def takes(self, weight: Tensor) -> bool:
        """Say whether the weight is one matrix."""
        return weight.dim() == 2

    def fan_in(self, weight: Tensor) -> int:
        """Return the length of the input's vectors."""
        return weight.shape[0]

    def matrix(self, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the weight, outputs first."""
        return weight.mT.unsqueeze(0)

    def weight_like(self, weight: Tensor, matrix: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the one matrix, inputs first."""
        return matrix.squeeze(0).mT


class ConvolutionLayer(Layer):
    """A convolution: the features of an output position are the input under its window.

    They are read off by the convolution itself, with a weight whose every output is one entry of the
    window; so strides, padding, dilation and transposition need no code of their own.
    """

    summed = 1

    def takes(self, weight: Tensor) -> bool:
        """Say whether the maps come in batches, as the weight's dimensions have it."""
        data = self.data.meta.get("val")
        return weight.dim() >= 3 and (data is None or data.dim() == weight.dim())

    def fan_in(self, weight: Tensor) -> int:
        """Return the entries of a window."""
        return weight.numel() // weight.shape[1 if self.is_transposed else 0]

    def features(self, data: Tensor, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the windows' entries, channel by channel."""
        groups, space = arguments["groups"], weight.shape[2:]
        inputs = weight.shape[0] // groups if self.is_transposed else weight.shape[1]
        count = inputs * space.numel()
        # 2 channels under a window of 3 are read by 6 filters [6, 2, 3], each of a single one: the
        # output's channels are the 6 entries at each position, channel by channel.
        entries = torch.eye(count, dtype=data.dtype, device=data.device)
        unit_weight = entries.reshape(count, inputs, *space)
        if self.is_transposed:
            unit_weight = unit_weight.transpose(0, 1)
        unit_weight = unit_weight.repeat(groups, 1, *[1] * len(space))
        return self.samples(self.value(data, unit_weight, None, arguments), arguments)

    def samples(self, output: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the positions of the maps `[batch, groups * channels, *space]`."""
        batch, channels = output.shape[:2]
        group_channels = channels // arguments["groups"]
        # [batch, groups, channels, positions] -> [groups, batch * positions, channels]
        by_group = output.reshape(batch, arguments["groups"], group_channels, -1)
        return by_group.permute(1, 0, 3, 2).reshape(arguments["groups"], -1, group_channels)

    def matrix(self, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the filters; a transposed convolution keeps inputs before outputs."""
        # [groups, outputs, inputs, *space], or inputs before outputs
        by_group = weight.reshape(arguments["groups"], -1, *weight.shape[1:])
        return (by_group.transpose(1, 2) if self.is_transposed else by_group).flatten(2)

    def weight_like(self, weight: Tensor, matrix: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the filters in their shape."""
        if self.is_transposed:
            inputs = weight.shape[0] // arguments["groups"]
            # [groups, outputs, inputs * space] -> [groups, inputs, outputs, space]
            matrix = matrix.unflatten(2, (inputs, -1)).transpose(1, 2)
        return matrix.reshape(weight.shape)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has inputs before outputs."""
        return "transpose" in str(self.node.target)


_USUAL = ("input", "weight", "bias")

# By operator, how it is seen, and the names of its input, weight and bias.
_KINDS: dict[Any, tuple[type[Layer], tuple[str, str, str]]] = {
    aten.linear: (LinearLayer, _USUAL),
    aten.addmm: (MatrixLayer, ("mat1", "mat2", "self")),
    aten.mm: (MatrixLayer, ("self", "mat2", "")),
    aten.matmul: (MatrixLayer, ("self", "other", "")),
    aten.conv1d: (ConvolutionLayer, _USUAL),
    aten.conv2d: (ConvolutionLayer, _USUAL),
    aten.conv3d: (ConvolutionLayer, _USUAL),
    aten.conv_transpose1d: (ConvolutionLayer, _USUAL),
    aten.conv_transpose2d: (ConvolutionLayer, _USUAL),
    aten.conv_transpose3d: (ConvolutionLayer, _USUAL),
}


def tensor_read_by(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """Return the tensor that a node of the graph reads from its module, without its history."""
    tensor: Tensor = attrgetter(str(node.target))(graph_module)
    return tensor.detach()


def layers_of(graph_module: fx.GraphModule) -> dict[str, Layer]:
    """Return, by the name of its weight, each layer whose parameters nothing else reads."""
    parameters = parameter_names(graph_module)
    readers: dict[str, set[fx.Node]] = {}
    for read in graph_module.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(read.target), set()).update(read.users)
    layers: dict[str, Layer] = {}
    for layer in filter(None, map(_layer, graph_module.graph.nodes)):
        parameter_nodes = [layer.weight, *([layer.bias] if layer.bias else [])]
        if all(readers.get(str(node.target)) == {layer.node} for node in parameter_nodes):
            weight, *biases = (parameters.get(str(node.target)) for node in parameter_nodes)
            # What `addmm` adds may be a matrix, which is no bias.
            has_flat_bias = all(vector is not None and vector.dim() == 1 for vector in biases)
            if weight is not None and layer.takes(weight) and has_flat_bias:
                layers[str(layer.weight.target)] = layer
    return layers


def _layer(node: fx.Node) -> Layer | None:
    """Return the layer that a node is, or None; what it takes for a weight may be anything yet."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in _KINDS:
        return None
    kind, names = _KINDS[packet]
    arguments = arguments_of(node)
    if arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        return None
    return kind(node, arguments[names[0]], arguments[names[1]], arguments.get(names[2]))
