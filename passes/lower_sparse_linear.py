"""Turn blocks of zeros in linear layers into time and memory that are saved."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from graphprune.graph_utils.edits import drop_unread, read_packed
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.inference.infer import infer
from graphprune.layout import size_of
from graphprune.onnx_export.providers import Runtime
from graphprune.ops.block_packing import Packed, columns_per_block, has_zeros, pack_if_smaller
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.runtime.autotune import warn_of_isolated_zeros, warn_of_slow
from graphprune.runtime.autotune.packed import LinearShape, MatrixShape

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerSparseLinear(Pass):
    """Linear layers whose matrix is zero but for some blocks compute those blocks alone.

    1. Blocks are packed, as many for each row of blocks: `graphprune.GradualSparsity(block=,
       balanced=True)` leaves them so.
    2. The layer becomes a gather of features and a batched product of matrices, blocks on the left, in
       ATen operators.

    Left alone, with a warning: layers that run no faster in ONNX Runtime at the example inputs' shape, by
    measurement, and layers whose zeros stand alone. Without one: layers that are dense, or whose
    parameters something else reads.

    The graph computes what it did, to rounding.

    Attributes:
        block: rows and columns of the blocks, rows being outputs; found from the zeros by default.
        measured: lower what is faster for it; otherwise whatever has such blocks.
        provider: where time is measured: "cpu", "cuda", "cuda-tf32", "cuda-float16", or an execution
            provider of ONNX Runtime.
        threads: threads inside an operator, on the CPU.

    """

    block: tuple[int, int] | None = None
    measured: bool = True
    provider: str = "cpu"
    threads: int = 1

    def rewrite(self, program: Program) -> bool:
        """Lower each linear layer that gains from it."""
        graph_module = program.graph_module
        inference = infer(graph_module, program.inputs)
        runtime = Runtime.of(self.provider, self.threads)
        race = functools.cache(lambda shape: shape.times(runtime))
        slow, scattered, lowered = [], [], []
        for name, layer in layers_of(graph_module).items():
            sizes = [size_of(layout) for layout in inference.nodes[layer.data.name]]
            if layer.summed != -1 or len(sizes) < 2:
                continue
            matrix = layer.matrix(tensor_read_by(graph_module, layer.weight), {}).squeeze(0)
            packed = pack_if_smaller(matrix, 1, self.block)
            if packed is None:
                scattered += [name] if has_zeros(matrix) else []
                continue
            if self.measured:
                shape = LinearShape(prod(sizes[:-1]), MatrixShape.of(matrix, packed))
                times = race(shape)
                if times["packed"] >= times["dense"]:
                    slow.append(name)
                    continue
            _lower(graph_module, layer, packed, len(matrix), len(sizes))
            lowered.append(name)
        drop_unread(graph_module, lowered)
        warn_of_slow("linear layers", slow, runtime)
        warn_of_isolated_zeros("linear layers", scattered)
        return bool(lowered)


def _lower(
    graph_module: fx.GraphModule, layer: Layer, packed: Packed, height: int, dims: int
) -> None:
    """Put the product of a packed matrix in the place of a layer.

    Args:
        graph_module: that holds the layer.
        layer: one of its layers.
        packed: its matrix.
        height: how many outputs the layer has.
        dims: dimensions of its data.

    """
    graph, call = graph_module.graph, graph_module.graph.call_function
    node, data = layer.node, layer.data
    block_rows, _, block_width = packed.blocks.shape
    run = columns_per_block(packed.blocks, packed.places)
    with graph.inserting_before(node):
        blocks, places = read_packed(graph_module, layer.weight, packed.blocks, packed.places)
        # [count, features] -> [features, count] -> [runs, run, count] -> [places, run, count]
        flat = data if dims == 2 else call(aten.flatten.using_ints, (data, 0, -2))
        by_run = call(aten.unflatten.int, (call(aten.t.default, (flat,)), 0, [-1, run]))
        gathered = call(aten.index_select.default, (by_run, 0, places))
        # [block rows, rows, width] @ [block rows, width, count] -> [block rows * rows, count]
        selected = call(aten.reshape.default, (gathered, [block_rows, block_width, -1]))
        product = call(aten.flatten.using_ints, (call(aten.bmm.default, (blocks, selected)), 0, 1))
        if packed.blocks.shape[:2].numel() != height:  # the last block reaches beyond the outputs
            product = call(aten.slice.Tensor, (product, 0, 0, height))
        result = call(aten.t.default, (product,))
        if dims != 2:
            sizes = [call(aten.sym_size.int, (data, dim)) for dim in range(dims - 1)]
            result = call(aten.unflatten.int, (result, 0, sizes))
        if layer.bias is not None:
            result = call(aten.add.Tensor, (result, layer.bias))
    result.meta = {key: entry for key, entry in node.meta.items() if key != "val"}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
