"""Which values on the way through a graph do not depend on its inputs.

The graph runs once with NaN for every input, and what is no NaN behind that does not depend on them.
Layers and batch norms whose weights are zero for a channel stop it there, which plain arithmetic would
not do (zero times NaN); operators that are not known to hand NaN on are taken to make nothing but NaN.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.graph_utils.stepwise import Run
from graphprune.rules import arguments_of, writes
from graphprune.utils.inputs import Inputs
from graphprune.utils.tensors import evaluation_mode, working_copy

aten = torch.ops.aten

# Each entry of the result is made of the entries that stand at its place; NaN gives NaN.
POINTWISE = (
    aten.relu, aten.relu_, aten.relu6, aten.relu6_, aten.hardtanh, aten.hardtanh_, aten.leaky_relu,
    aten.leaky_relu_, aten.gelu, aten.silu, aten.silu_, aten.sigmoid, aten.sigmoid_, aten.tanh,
    aten.tanh_, aten.elu, aten.elu_, aten.softplus, aten.hardswish, aten.hardswish_, aten.hardsigmoid,
    aten.mish, aten.mish_, aten.abs, aten.neg, aten.exp, aten.square, aten.sqrt, aten.rsqrt, aten.clamp,
    aten.clamp_min, aten.add, aten.add_, aten.sub, aten.mul, aten.mul_, aten.div,
    aten.dropout, aten.dropout_, aten.feature_dropout, aten.alpha_dropout,
)  # fmt: skip

# Maximum and mean of a window: of a map that is the same everywhere, itself.
POOLING = (
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d,
)  # fmt: skip

# Entries in other places.
REARRANGING = (
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.permute,
    aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.expand, aten.split,
    aten.split_with_sizes, aten.chunk, aten.unbind, aten.cat, aten.stack, aten.clone, aten.contiguous,
    aten.alias, aten.detach, aten.slice, aten.select, aten.narrow,
)  # fmt: skip

# Which entries they take may follow from the sizes of the inputs.
_CHOOSING = (aten.slice, aten.select, aten.narrow)


def constant_inputs(graph_module: fx.GraphModule, inputs: Inputs) -> dict[str, Tensor]:
    """Return, by the name of its weight, what each layer reads: NaN where it depends on the inputs.

    What does not depend on the inputs' values does not depend on their sizes either.
    """
    # a graph may write to its buffers
    tainted, plain = (cast(fx.GraphModule, working_copy(graph_module)) for _ in range(2))
    with evaluation_mode(tainted), evaluation_mode(plain), torch.no_grad():
        run = _NaNPropagator(tainted, Run(plain, inputs, list(plain.graph.nodes)), inputs)
        run.until(run.order[-1], inclusive=True)
    return run.read


class _NaNPropagator(Run):
    """A run in which NaN stands for what depends on the inputs; a plain run gives the shapes of that."""

    def __init__(self, graph_module: fx.GraphModule, plain: Run, inputs: Inputs) -> None:
        super().__init__(graph_module, inputs, list(graph_module.graph.nodes))
        self.of, self.plain = graph_module, plain
        self.layers = {layer.node: layer for layer in layers_of(graph_module).values()}
        self.varying: set[fx.Node] = set()  # nodes of whole numbers, which hold no NaN
        self.written = names_written_by(graph_module)
        self.read: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, or give NaN for what it makes."""
        # `place` has moved on to the next node: the one before it is this node.
        value = self.plain.until(self.plain.order[self.place - 1], inclusive=True)
        if n.op == "get_attr":
            tensor = super().run_node(n)
            return self._taint(n, tensor) if n.target in self.written else tensor
        if n.op == "output":
            return value
        varies = any(source in self.varying for source in n.all_input_nodes)
        packet = getattr(n.target, "overloadpacket", None)
        if n in self.layers and not varies:
            return self._layer(self.layers[n])
        if packet is aten.batch_norm and not varies:
            return self._norm(n)
        # A size that varies moves entries about and leaves them what they are, but for those that choose.
        if packet in REARRANGING or n.target is operator.getitem:
            is_tainted = varies and (packet in _CHOOSING or self._reads_varying_tensor(n))
        elif packet in POINTWISE or packet in POOLING:
            is_tainted = varies
        else:
            is_chance = torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
            is_tainted = n.op == "placeholder" or varies or is_chance or self._reads_nan(n)
        if isinstance(value, (int, float, torch.SymInt)):
            self.varying.add(n)
        if is_tainted:
            return self._taint(n, value)
        value = super().run_node(n)
        return self._taint_uneven(n, value) if packet in POOLING else value

    def _reads_varying_tensor(self, node: fx.Node) -> bool:
        return any(
            source in self.varying and isinstance(self.env[source], Tensor)
            for source in node.all_input_nodes
        )

    def _reads_nan(self, node: fx.Node) -> bool:
        leaves = pytree.tree_leaves([self.env[source] for source in node.all_input_nodes])
        return any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in leaves)

    def _taint(self, node: fx.Node, value: Any) -> Any:
        """Return the value with NaN for every number that can be; note the node where some cannot."""
        leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
        if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            self.varying.add(node)
        if writes(node):
            # In place, so that whatever shares the memory is NaN too.
            written = self.env[node.all_input_nodes[0]]
            return written.fill_(torch.nan) if written.is_floating_point() else written
        return pytree.tree_map_only(
            Tensor, lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, value
        )

    def _layer(self, layer: Layer) -> Tensor:
        """Return a layer's output: NaN where an entry of its input that is NaN has a weight.

        At a padded border a constant other than zero makes another value than inside, so that the
        output would depend on the size of the map.
        """
        data: Tensor = self.env[layer.data]
        weight = tensor_read_by(self.of, layer.weight)
        bias = tensor_read_by(self.of, layer.bias) if layer.bias else None
        arguments = layer.arguments(self.env)
        self.read[str(layer.weight.target)] = data.clone()
        counts = data != 0 if pads(arguments) else data.isnan()
        value = layer.value(_without_nan(data), weight, bias, arguments)
        # By entry, how many that count meet a weight that is not zero: a whole number, 0 or above a half.
        reached = layer.value(counts.to(weight), (weight != 0).to(weight), None, arguments)
        return value.masked_fill(reached > 0.5, torch.nan)

    def _norm(self, node: fx.Node) -> Tensor:
        """Return a batch norm's output: NaN where its input is and the channel's scale is not zero."""
        arguments = arguments_of(node)
        values = fx.map_arg(arguments, self.env.__getitem__)
        data, scale = values["input"], values["weight"]
        result: Tensor = node.target(**{**values, "input": _without_nan(data)})  # type: ignore[operator]
        if values["training"] or values["running_mean"] is None:
            return torch.full_like(result, torch.nan)
        live = torch.ones(data.shape[1], dtype=torch.bool) if scale is None else scale != 0
        shape = (1, -1, *[1] * (data.dim() - 2))
        return result.masked_fill(data.isnan() & live.to(data.device).view(shape), torch.nan)

    def _taint_uneven(self, node: fx.Node, value: Tensor) -> Tensor:
        """Return what a window makes of maps; NaN for maps that are not the same everywhere."""
        (source, *_) = node.all_input_nodes
        # The last two dimensions for `max_pool2d`.
        space = tuple(range(-int(node.target.overloadpacket.__name__[-2]), 0))  # type: ignore[union-attr]
        data = self.env[source]
        # NaN is unlike itself, so it stays.
        uneven = data.amax(space, keepdim=True) != data.amin(space, keepdim=True)
        return value.masked_fill(uneven, torch.nan)


def names_written_by(graph_module: fx.GraphModule) -> set[Any]:
    """Return the names of held tensors that a graph writes to, which are no constants."""
    return {_origin(node).target for node in graph_module.graph.nodes if writes(node)}


def _origin(node: fx.Node) -> fx.Node:
    """Return what holds the memory that a node writes to, or gives another view of."""
    while node.op == "call_function" and node.all_input_nodes:
        if not (writes(node) or getattr(node.target, "overloadpacket", None) in REARRANGING):
            break
        node = node.all_input_nodes[0]
    return node


def pads(arguments: Mapping[str, Any]) -> bool:
    """Say whether a layer called with these arguments sees zeros around its input."""
    padding = arguments.get("padding", 0)
    pads_input = any(padding) if isinstance(padding, (list, tuple)) else padding not in (0, "valid")
    return pads_input or "output_padding" in arguments


def _without_nan(data: Tensor) -> Tensor:
    return data.masked_fill(data.isnan(), 0.0)
