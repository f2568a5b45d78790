"""Make batch norms part of the layers before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.graph_utils.edits import drop_unread, rescale
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.rules import arguments_of

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Batch norms in evaluation become part of the convolution or linear layer whose output they read.

    1. The layer's weight is scaled, channel by channel; in float64, then rounded once.
    2. Its bias takes the norm's shift; a layer without one gets one.
    3. The norm goes, and so do those of its tensors that nothing else reads.

    The graph is for inference: in training it does what the original does in evaluation.

    Left alone: norms that take the statistics of a batch, norms of a value that something else reads
    too, and layers whose weight several operators read.
    """

    def rewrite(self, program: Program) -> bool:
        """Fold each norm that follows a layer."""
        folds = list(_folds(program.graph_module))
        for layer, norm in folds:
            _fold(program.graph_module, layer, norm)
        return bool(folds)


def _folds(graph_module: fx.GraphModule) -> Iterator[tuple[Layer, fx.Node]]:
    """Yield layers with the norm that alone reads their output."""
    for layer in layers_of(graph_module).values():
        readers = list(layer.node.users)
        if len(readers) == 1 and readers[0].target is aten.batch_norm.default:
            arguments = arguments_of(readers[0])
            reads_layer = arguments["input"] is layer.node and layer.channels_are_second
            has_fixed_statistics = (
                arguments["running_mean"] is not None and arguments["training"] is not True
            )
            if reads_layer and has_fixed_statistics:
                yield layer, readers[0]


def _fold(graph_module: fx.GraphModule, layer: Layer, norm: fx.Node) -> None:
    arguments = arguments_of(norm)

    def read(name: str, default: float) -> Tensor | float:
        node = arguments[name]
        return default if node is None else tensor_read_by(graph_module, node).double()

    deviation = (read("running_var", 1.0) + arguments["eps"]) ** 0.5
    factor = torch.as_tensor(read("weight", 1.0) / deviation)
    # All [channels]: factor (x - mean) + bias = factor x + (bias - factor mean).
    rescale(graph_module, layer, factor, read("bias", 0.0) - factor * read("running_mean", 0.0))
    norm.replace_all_uses_with(norm.all_input_nodes[0])

    tensors = [arguments[name] for name in ("weight", "bias", "running_mean", "running_var")]
    graph_module.graph.erase_node(norm)
    owner = str(arguments["running_mean"].target).removesuffix("running_mean")
    names = [str(node.target) for node in tensors if node is not None]
    drop_unread(graph_module, [*names, f"{owner}num_batches_tracked"])
