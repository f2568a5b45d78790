"""Switch connections between filters off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphprune.graph_utils.edits import read_buffer
from graphprune.groups.groups import Dependencies
from graphprune.importance import Loss
from graphprune.inference.infer import infer
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.sparsity.connections import PatternName, choose_connectivity
from graphprune.sparsity.connections.parametrization import mask_like


@dataclass(frozen=True)
class SparseConnections(Pass):
    """Each filter of a convolution reads a fraction of the channels before it, at every tap the same.

    1. A mask of booleans stands in the graph beside each weight, and the convolution reads their product:
       what is off stays off while the graph is trained.
    2. Filters that no output depends on read nothing.

    `LowerSparseConnections` turns the zeros into time. `graphprune.connect_sparsely` is the same for a
    module that keeps its class; sources stand there.

    Left alone: convolutions that are grouped, transposed, read or make fewer than eight channels, or share
    their weight; those that read the model's input, unless `first`.

    Attributes:
        fraction: of the channels that each filter reads, rounded up; 0 < fraction <= 1.
        pattern: "random", "expander", "magnitude" or "taylor".
        share: filters that read the same channels, at most.
        seed: for chance.
        first: also convolutions that read the model's input.
        data: batches with targets, for "taylor".
        loss: of the model's output and a batch's target, for "taylor".

    """

    fraction: float = 0.25
    pattern: PatternName = "random"
    share: int = 32
    seed: int = 0
    first: bool = False
    data: Any = None
    loss: Loss | None = None

    def rewrite(self, program: Program) -> bool:
        """Put a mask beside each weight."""
        graph_module = program.graph_module
        graph = Dependencies(infer(graph_module, program.inputs))
        wiring = choose_connectivity(graph_module, graph, **vars(self))
        connections = wiring.connections(self.fraction)
        for read in graph_module.graph.find_nodes(op="get_attr"):
            name = str(read.target)
            if name in connections:
                mask = mask_like(graph_module.get_parameter(name), connections[name])
                _mask(graph_module, read, mask)
        return bool(connections)


def _mask(graph_module: fx.GraphModule, read: fx.Node, mask: torch.Tensor) -> None:
    """Have what reads a weight read its product with a mask."""
    graph, name = graph_module.graph, str(read.target)
    with graph.inserting_after(read):
        mask_node = read_buffer(graph_module, name, f"{name.rpartition('.')[2]}_mask", mask)
    with graph.inserting_after(mask_node):
        product = graph.call_function(torch.ops.aten.mul.Tensor, (read, mask_node))
    product.meta = dict(read.meta)
    read.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
