"""Turn connections that are off into time and memory that are saved."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from graphprune.passes.absorb_constants import compute_constants
from torch import Tensor, fx

from graphprune.graph_utils.edits import put_parameter, read_buffer
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.inference.infer import infer
from graphprune.inference.recorded import Inference
from graphprune.layout import Axis, Layout, resolve, size_of
from graphprune.onnx_export.providers import Runtime
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.rules import arguments_of
from graphprune.runtime.autotune import warn_of_slow
from graphprune.runtime.autotune.convolution import ConvolutionShape, Form, find_fastest_form
from graphprune.shrink.reorder import Order, old_positions, reorder_slots
from graphprune.sparsity.connections.filter_blocks import Blocks

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)

_ADVICE = "; filters have to share their channels with enough others, as with share=32"


@dataclass(frozen=True)
class LowerSparseConnections(Pass):
    """Convolutions with connections that are off, whoever switched them off, compute the others alone.

    1. Products of weights and masks become weights.
    2. Filters that read the same channels are put together, and channels that one such block alone reads,
       by another order of the channels of what stands before and behind: that costs nothing.
    3. The convolution becomes a gather of channels, where they are in no such order, and a grouped
       convolution; or, with a window of one, a product of matrices. The form that ONNX Runtime runs
       fastest at the example inputs' shape is taken, by measurement.

    Left alone, with a warning: convolutions that run no faster in any form, above all those whose filters
    all read other channels. Without one: those that are dense, grouped or transposed.

    The graph computes what it did, to rounding.

    Attributes:
        measured: take the fastest form; otherwise the grouped one wherever filters share their channels.
        provider: where time is measured: "cpu", "cuda", "cuda-tf32", "cuda-float16", or an execution
            provider of ONNX Runtime.
        threads: threads inside an operator, on the CPU.

    """

    measured: bool = True
    provider: str = "cpu"
    threads: int = 1

    def rewrite(self, program: Program) -> bool:
        """Lower each sparse convolution that gains from it."""
        computed = compute_constants(program.graph_module)
        inference = infer(program.graph_module, program.inputs)
        chosen, orders = self._choose(program.graph_module, inference)
        if not all(_is_in_order(order, axis.size) for axis, order in orders.items()):
            program.graph_module = cast(
                fx.GraphModule, reorder_slots(program.graph_module, inference, orders)
            )
        layers = layers_of(program.graph_module)
        for name, (form, blocks) in chosen.items():
            filters, channels = (old_positions(x, orders) for x in inference.parameters[name][:2])
            _lower(program.graph_module, layers[name], blocks.reorder(filters, channels), form)
        return computed or bool(chosen)

    def _choose(
        self, graph_module: fx.GraphModule, inference: Inference
    ) -> tuple[dict[str, tuple[Form, Blocks]], dict[Axis, Order]]:
        """Return the forms of weights that gain, and orders that save gathers; warn of the others."""
        runtime = Runtime.of(self.provider, self.threads)
        race = functools.cache(lambda shape: find_fastest_form(shape, runtime))
        chosen: dict[str, tuple[Form, Blocks]] = {}
        orders: dict[Axis, Order] = {}
        slow = []
        for name, layer in layers_of(graph_module).items():
            blocks = _blocks(graph_module, layer)
            if blocks is None:
                continue
            outer, inner = inference.parameters[name][:2]
            channel_order, filter_order = blocks.channels.flatten(), blocks.filters.flatten()
            inputs = _find_axis_to_order(channel_order, inner, orders)
            outputs = _find_axis_to_order(filter_order, outer, orders)
            # One axis, as of a residual, cannot take two orders.
            outputs = None if outputs is inputs else outputs
            form: Form = "dense" if blocks.size == 1 else "grouped"
            if self.measured and form == "grouped":
                moves = {
                    "gathers": inputs is None and not _is_in_order(channel_order, size_of(inner)),
                    "sorts": outputs is None and not _is_in_order(filter_order, size_of(outer)),
                }
                weight = tensor_read_by(graph_module, layer.weight)
                data = inference.nodes[layer.data.name]
                form = race(_shape(layer, weight, data, blocks, **moves))
            if form == "dense":
                slow.append(f"{name} ({len(blocks.filters)} blocks of {blocks.size})")
                continue
            chosen[name] = form, blocks
            orders.update({inputs: channel_order} if inputs is not None else {})
            orders.update({outputs: filter_order} if outputs is not None else {})
        warn_of_slow("convolutions", slow, runtime, _ADVICE)
        return chosen, orders


def _find_axis_to_order(order: Order, layout: Layout, orders: Mapping[Axis, Order]) -> Axis | None:
    """Return the axis that a dimension is, if its slots can be put in that order and in no other yet."""
    axis = resolve(layout)
    if not isinstance(axis, Axis) or axis.fixed is not None or axis in orders:
        return None
    return axis if np.array_equal(np.sort(order), np.arange(axis.size)) else None


def _is_in_order(order: Order, size: int) -> bool:
    return np.array_equal(order, np.arange(size))


def _blocks(graph_module: fx.GraphModule, layer: Layer) -> Blocks | None:
    """Return the blocks of a convolution that is sparse, and None of any other layer.

    One that has a few zeros, but a filter that reads everything, is not: one block would read it all.
    """
    packet = layer.node.target.overloadpacket  # type: ignore[union-attr]
    weight = tensor_read_by(graph_module, layer.weight)
    if packet not in _CONVOLUTIONS or layer.groups > 1:
        return None
    blocks = Blocks.of((weight != 0).flatten(2).any(2).cpu().numpy())
    reads_all = blocks is not None and blocks.channels.shape == (1, weight.shape[1])
    return None if reads_all else blocks


def _shape(
    layer: Layer, weight: Tensor, data: Sequence[Layout], blocks: Blocks, **moves: bool
) -> ConvolutionShape:
    """Return what the time of a layer depends on; `moves` are the gathers before and behind it."""
    arguments = arguments_of(layer.node)
    stride, padding, dilation = (arguments[name] for name in ("stride", "padding", "dilation"))
    window = tuple(weight.shape[2:])
    if isinstance(padding, str):
        is_same = padding == "same"
        padding = [
            d * (n - 1) // 2 if is_same else 0 for d, n in zip(dilation, window, strict=True)
        ]

    def per_dimension(value: Any) -> tuple[int, ...]:
        return tuple(value) * (1 if len(value) == len(window) else len(window))

    return ConvolutionShape(
        tuple(map(size_of, data)), tuple(weight.shape), len(blocks.filters), blocks.size,
        blocks.channels.shape[1], per_dimension(stride), per_dimension(padding),
        per_dimension(dilation), **moves,
    )  # fmt: skip


def _lower(graph_module: fx.GraphModule, layer: Layer, blocks: Blocks, form: Form) -> None:
    """Put another form in the place of a convolution."""
    graph, node = graph_module.graph, layer.node
    channel_order, filter_order = blocks.channels.flatten(), blocks.filters.flatten()
    name = str(layer.weight.target)
    weight = graph_module.get_parameter(name)
    # [blocks, filters, 1] and [blocks, 1, channels] take [blocks, filters, channels, *window].
    entries = (
        torch.from_numpy(blocks.filters).unsqueeze(2),
        torch.from_numpy(blocks.channels).unsqueeze(1),
    )
    packed = weight.detach()[entries].flatten(0, 1)
    # -1 fills up a block, and has read the last filter.
    packed[filter_order < 0] = 0.0
    put_parameter(graph_module, name, packed, weight)
    if layer.bias is not None:
        bias = graph_module.get_parameter(str(layer.bias.target))
        put_parameter(graph_module, str(layer.bias.target), bias.detach()[filter_order], bias)
    with graph.inserting_before(node):
        maps = layer.data
        if not _is_in_order(channel_order, weight.shape[1]):
            maps = _select(graph_module, maps, name, "channels", channel_order)
        if form == "grouped":
            arguments = {**arguments_of(node), "input": maps, "groups": len(blocks.filters)}
            maps = graph.create_node("call_function", node.target, tuple(arguments.values()))
        else:
            maps = _product(graph, maps, layer, blocks)
        maps.meta = {key: entry for key, entry in node.meta.items() if key != "val"}
        if not _is_in_order(filter_order, weight.shape[0]):
            # Where each filter stands now; -1 sorts before all filters, and is left out.
            filter_positions = np.argsort(filter_order)[np.count_nonzero(filter_order < 0) :]
            maps = _select(graph_module, maps, name, "filters", filter_positions)
    node.replace_all_uses_with(maps)
    graph.erase_node(node)


def _select(
    graph_module: fx.GraphModule, maps: fx.Node, weight: str, leaf: str, order: Order
) -> fx.Node:
    """Read channels in another order, which a buffer beside the weight holds."""
    index = torch.from_numpy(order).to(graph_module.get_parameter(weight).device)
    index_node = read_buffer(graph_module, weight, leaf, index)
    return graph_module.graph.call_function(aten.index_select.default, (maps, 1, index_node))


def _product(graph: fx.Graph, maps: fx.Node, layer: Layer, blocks: Blocks) -> fx.Node:
    """Compute a convolution with a window of one as a product of matrices, block by block."""
    dims = len(arguments_of(layer.node)["stride"])
    by_block = graph.call_function(aten.unflatten.int, (maps, 1, [len(blocks.filters), -1]))
    # [batch, blocks, channels, positions], then [blocks, filters, channels] @ it
    flat = graph.call_function(aten.flatten.using_ints, (by_block, 3))
    matrix = graph.call_function(
        aten.view.default, (layer.weight, [len(blocks.filters), blocks.size, -1])
    )
    product = graph.call_function(aten.matmul.default, (matrix, flat))
    # [batch, blocks, filters, positions] -> [batch, blocks * filters, positions] -> [..., *space]
    merged = graph.call_function(aten.flatten.using_ints, (product, 1, 2))
    space = [graph.call_function(aten.sym_size.int, (maps, dim)) for dim in range(2, 2 + dims)]
    result = graph.call_function(aten.unflatten.int, (merged, 2, space))
    if layer.bias is None:
        return result
    bias = graph.call_function(aten.view.default, (layer.bias, [-1, *[1] * dims]))
    return graph.call_function(aten.add.Tensor, (result, bias))
