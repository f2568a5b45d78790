"""The loss without a channel, by trying it: once for every channel, many channels at once.

What a channel does not reach is computed once a batch and kept. A layer that reads it is linear, so its
output without the channel is the output as it is, less what the channel alone gives: a product with one
column of its weight instead of all. Only what lies behind is computed anew, for many channels side by
side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphprune.calibration.batches import Batch
from graphprune.capture.capture import graph_of
from graphprune.errors import CaptureError
from graphprune.graph_utils.linear_layers import (
    ConvolutionLayer,
    Layer,
    MatrixLayer,
    layers_of,
    tensor_read_by,
)
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies, Group, Scores
from graphprune.groups.readers import Reader, readers_of
from graphprune.importance.context import Loss, ScoringContext
from graphprune.importance.gated_loss import GatedLoss
from graphprune.importance.losses import refuse_infinite_loss
from graphprune.importance.vmap_or_loop import for_each
from graphprune.inference.infer import infer
from graphprune.rules import is_in_place
from graphprune.rules.recurrent import GATES
from graphprune.utils.progress import track
from graphprune.utils.tensors import evaluation_mode, named_tensors


@torch.no_grad()
def oracle(subject: ScoringContext) -> Scores:
    """Score by the change of the loss itself when the channel is gone: brute force.

    Channels that something else than a plain layer reads, and models that cannot be traced, write over
    their values or are recurrent, are run whole with a gate on every channel.
    """
    gated = GatedLoss(subject, differentiated=False)
    assert subject.loss is not None
    graph_module = _traced(subject)
    readers = {} if graph_module is None else _readers(subject, graph_module)
    total = {name: np.zeros(size) for name, size in gated.sizes.items()}
    for batch, weight in track(
        gated.weighted_batches(), "scoring channels", len(subject.data.batches)
    ):
        with gated.naming(batch):
            changes = _changes(gated, batch, graph_module if readers else None, readers)
        for name, change in changes.items():
            total[name] += weight * change.double().cpu().numpy()
    return {name: mean.numpy() for name, mean in subject.data.total(total).items()}


def _changes(
    gated: GatedLoss,
    batch: Batch,
    graph_module: fx.GraphModule | None,
    readers: Mapping[str, list[tuple[Layer, Tensor]]],
) -> dict[str, Tensor]:
    """Return, by group, how the loss of a batch changes without each channel."""
    graph_values = None if graph_module is None else _Known.of(graph_module, batch, gated.loss)
    intact_loss = (
        graph_values.as_it_is() if graph_values else gated(gated.ones(), batch.inputs, batch.target)
    )
    refuse_infinite_loss(intact_loss, batch)
    changes = {}
    for name, open_gates in gated.ones().items():
        if graph_values is not None and name in readers:
            losses = graph_values.without_each(readers[name])
        else:
            loss_of_gates = partial(_loss_of_one, gated, batch, name)
            # a row a channel: every gate is open but its own
            losses = for_each(loss_of_gates, 1 - torch.diag(open_gates))
        changes[name] = losses - intact_loss
    return changes


def _loss_of_one(gated: GatedLoss, batch: Batch, group: str, factors: Tensor) -> Tensor:
    """Return the loss as a function of one group's gates."""
    return gated({**gated.ones(), group: factors}, batch.inputs, batch.target)


def _traced(subject: ScoringContext) -> fx.GraphModule | None:
    try:
        graph_module = graph_of(subject.model, subject.data[0].inputs)
    except CaptureError:
        return None
    targets = [n.target for n in graph_module.graph.nodes if isinstance(n.target, OpOverload)]
    # a recurrent operator cannot run many channels side by side; its steps, one by one, can
    barred = any(is_in_place(target) or target.overloadpacket in GATES for target in targets)
    return None if barred else graph_module


def _readers(
    subject: ScoringContext, graph_module: fx.GraphModule
) -> dict[str, list[tuple[Layer, Tensor]]]:
    """Return, by group, the layers that read it and the positions of each channel in what they read.

    Shape of the positions: `[channels, positions of a channel]`. Groups that something else reads
    are left out.
    """
    graph = Dependencies(infer(graph_module, subject.data[0].inputs))
    layers, weights = layers_of(graph_module), named_tensors(graph_module)
    readers_by_group = {}
    for name, readers in readers_of(graph).items():
        group = graph.by_name[name]
        candidates = [
            _locate_channels(reader, group, layers.get(reader.parameter), weights[reader.parameter])
            for reader in readers
        ]
        located = [(layer, positions) for layer, positions in filter(None, candidates)]
        if located and len(located) == len(readers) and name in subject.graph.by_name:
            readers_by_group[name] = located
    return readers_by_group


def _locate_channels(
    reader: Reader, group: Group, layer: Layer | None, weight: Tensor
) -> tuple[Layer, Tensor] | None:
    """Return the layer and the positions of each channel, or None where it is read in other ways."""
    if layer is None or layer.groups != 1:
        return None
    occurrences = reader.slots(group, weight)
    # `[inputs, rest of the weight]`: all entries of an input have to be of one slot
    slots_by_input = occurrences[0].reshape(weight.shape).movedim(_summed_dim(layer), 0).flatten(1)
    if len(occurrences) != 1 or not bool((slots_by_input == slots_by_input[:, :1]).all()):
        return None
    slots = slots_by_input[:, 0]
    # inputs sorted by slot, without those of slot -1, which come first: of -1 1 0 1 0 the rows 2 4 and 1 3
    order = torch.argsort(slots, stable=True)[int((slots < 0).sum()) :]
    if len(order) == 0 or len(order) % group.size:
        return None
    return layer, order.reshape(group.size, -1)


def _summed_dim(layer: Layer) -> int:
    """Return the dimension of the weight over which the layer sums."""
    transposed = isinstance(layer, ConvolutionLayer) and layer.is_transposed
    return 0 if isinstance(layer, MatrixLayer) or transposed else 1


@dataclass(frozen=True)
class _Known:
    """All values of a graph on one batch."""

    graph_module: fx.GraphModule
    batch: Batch
    loss: Loss
    values: Mapping[fx.Node, Any]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, batch: Batch, loss: Loss) -> _Known:
        with evaluation_mode(graph_module):
            order = list(graph_module.graph.nodes)
            run = Run(graph_module, batch.inputs, order, keep=True, what=str(batch))
            run.until(graph_module.graph.output_node())
        return cls(graph_module, batch, loss, run.env)

    def as_it_is(self) -> Tensor:
        """Return the loss with all channels."""
        return self._loss(self.values)

    def _loss(self, values: Mapping[fx.Node, Any]) -> Tensor:
        flat_outputs = fx.map_arg(self.graph_module.graph.output_node().args[0], values.__getitem__)
        output = self.graph_module.graph.process_outputs(flat_outputs)
        return self.loss(output, self.batch.target).reshape(())

    def without_each(self, readers: Sequence[tuple[Layer, Tensor]]) -> Tensor:
        """Return the loss without each channel, `[channels]`."""
        reader_nodes = {layer.node for layer, _ in readers}
        reached: set[fx.Node] = set()
        for node in self.graph_module.graph.nodes:
            if node in reader_nodes or reached.intersection(node.all_input_nodes):
                reached.add(node)
        nodes_behind = [
            n for n in self.graph_module.graph.nodes if n in reached and n.op != "output"
        ]
        loss_without = partial(self._loss_without, [layer for layer, _ in readers], nodes_behind)
        positions_by_layer = [positions for _, positions in readers]
        losses: Tensor = for_each(loss_without, *positions_by_layer)
        return losses

    def _loss_without(
        self, layers: Sequence[Layer], nodes_behind: Sequence[fx.Node], *positions_by_layer: Tensor
    ) -> Tensor:
        """Return the loss without the channel at these positions of what the layers read."""
        layer_of_node = {
            layer.node: (layer, positions)
            for layer, positions in zip(layers, positions_by_layer, strict=True)
        }
        interpreter = fx.Interpreter(self.graph_module, garbage_collect_values=False)
        interpreter.extra_traceback = False
        values = interpreter.env = dict(self.values)
        changed: set[fx.Node] = set()
        for node in nodes_behind:
            # a layer whose input is as before keeps its value, less what the channel gave to it
            if node not in layer_of_node or changed.intersection(node.all_input_nodes):
                values[node] = interpreter.run_node(node)
            if node in layer_of_node:
                values[node] = values[node] - self._compute_contribution(
                    *layer_of_node[node], values
                )
            changed.add(node)
        return self._loss(values)

    def _compute_contribution(
        self, layer: Layer, positions: Tensor, values: Mapping[fx.Node, Any]
    ) -> Tensor:
        """Return what the channel at these positions gives."""
        weight = tensor_read_by(self.graph_module, layer.weight)
        data = values[layer.data].index_select(layer.summed, positions)
        channel_weight = weight.index_select(_summed_dim(layer), positions)
        # without the bias, which stays when the channel goes
        return layer.value(data, channel_weight, None, layer.arguments(values))
