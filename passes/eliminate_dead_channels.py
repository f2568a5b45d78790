"""Remove channels that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.graph_utils.constant_inputs import constant_inputs, pads
from graphprune.graph_utils.edits import put_bias
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.groups.groups import Dependencies, Group
from graphprune.groups.readers import Reader, readers_of, unread_groups
from graphprune.inference.infer import infer
from graphprune.masks import slots_of
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.selection.plan import Plan
from graphprune.slimming.slim import slimmed
from graphprune.utils.tensors import evaluation_mode, named_tensors


@dataclass(frozen=True)
class EliminateDeadChannels(Pass):
    """Channels that no output depends on, or that are the same for every input, go; nothing is lost.

    1. Channels that nothing reads, or that only zero weights read.
    2. Channels that are zero whatever comes in: zero filters, a batch norm of scale zero whose shift
       the ReLU behind it cuts off.
    3. Channels that are another constant: what they add becomes part of the bias of what reads them.
    4. Again, until nothing is found: what fed only dead channels is dead by then.

    Left alone: groups that a norm runs along; constants that a padded or transposed convolution reads,
    since they add less at its borders; the last channel of a group. In evaluation the graph computes
    what the original does, to rounding.
    """

    def rewrite(self, program: Program) -> bool:
        """Remove dead channels until there are none."""
        changed = False
        while (plan := _plan_removal(program)).removed:
            result = slimmed(program.graph_module, example_inputs=program.inputs, plan=plan)
            assert isinstance(result.model, fx.GraphModule)
            program.graph_module = result.model
            changed = True
        return changed


def _plan_removal(program: Program) -> Plan:
    """Return the plan that removes dead channels, once their constants are in the biases behind them."""
    graph_module = program.graph_module
    graph = Dependencies(infer(graph_module, program.inputs))
    with evaluation_mode(graph_module):
        reading = _Reading(graph_module, graph, constant_inputs(graph_module, program.inputs))
    unread, readers = unread_groups(graph), readers_of(graph)
    keep, sizes = {}, {}
    for group in graph.groups:
        group_readers = [] if group.name in unread else readers[group.name]
        is_known = group_readers or group.name in unread  # not so where buffers alone read it
        if group.exact and group.size > 1 and is_known:
            dead = reading.find_dead(group, group_readers)
            keep[group.name] = (~dead).nonzero().flatten().tolist()
            sizes[group.name] = group.size
    reading.add_to_biases()
    return Plan(keep, sizes)


class _Reading:
    """The layers of a graph, what they read where it is constant, and what will be added to biases."""

    def __init__(
        self, graph_module: fx.GraphModule, graph: Dependencies, constants: dict[str, Tensor]
    ) -> None:
        self.graph_module = graph_module
        self.nodes = graph.inference.nodes
        self.tensors = named_tensors(graph_module)
        self.layers = layers_of(graph_module)
        self.constants = constants
        self.extra: dict[str, Tensor] = {}

    def find_dead(self, group: Group, readers: Sequence[Reader]) -> Tensor:
        """Return which channels of a group are dead, `[channels]`, never all; note what they add."""
        silent_by_reader = [
            self._find_unweighted(group, reader) | self._find_zero(group, reader)
            for reader in readers
        ]
        steady_by_reader = [self._find_constant(group, reader) for reader in readers]
        dead = torch.ones(group.size, dtype=torch.bool)
        for silent, steady in zip(silent_by_reader, steady_by_reader, strict=True):
            dead &= silent | steady
        dead[0] &= not dead.all()  # one channel is left of a group that is dead
        # What a reader multiplies by zero adds nothing there, whatever constant it is.
        for reader, silent in zip(readers, silent_by_reader, strict=True):
            if bool((dead & ~silent).any()):
                self._note(group, reader, dead & ~silent)
        return dead

    def _find_unweighted(self, group: Group, reader: Reader) -> Tensor:
        """Return the channels that the reader's weights multiply by zero."""
        parameter = self.tensors[reader.parameter].detach()
        silent = torch.ones(group.size, dtype=torch.bool)
        for slots in reader.slots(group, parameter):
            silent[slots[(parameter.flatten().cpu() != 0) & (slots >= 0)]] = False
        return silent

    def _find_zero(self, group: Group, reader: Reader) -> Tensor:
        """Return the channels that are zero where the reader finds them."""
        return self._find_throughout(group, reader, lambda rows: (rows == 0).all(1))

    def _find_constant(self, group: Group, reader: Reader) -> Tensor:
        """Return the channels that are one number everywhere, so that a bias can stand for them."""
        layer = self.layers.get(reader.parameter)
        if layer is None or _computes_arguments(layer) or pads(layer.arguments({})):
            return torch.zeros(group.size, dtype=torch.bool)
        return self._find_throughout(group, reader, lambda rows: rows.amax(1) == rows.amin(1))

    def _find_throughout(
        self, group: Group, reader: Reader, holds: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the channels for which something holds of all values that the reader finds.

        Args:
            group: whose channels.
            reader: where they are read.
            holds: from values, `[positions of the summed dimension, all others]`, to one truth a row.

        """
        holds_throughout = torch.zeros(group.size, dtype=torch.bool)
        occurrences = self._occurrences(group, reader)
        if occurrences:
            layer = self.layers[reader.parameter]
            # [positions, all others]; NaN, which depends on the inputs, is neither zero nor one number
            data = self.constants[reader.parameter].movedim(layer.summed, 0).flatten(1)
            holds_at = holds(data).cpu()
            holds_throughout[:] = True
            for slots in occurrences:
                holds_throughout[slots[~holds_at & (slots >= 0)]] = False
        return holds_throughout

    def _occurrences(self, group: Group, reader: Reader) -> list[Tensor]:
        """Return which channel each position of what a layer reads belongs to, or -1."""
        layer = self.layers.get(reader.parameter)
        if layer is None or reader.parameter not in self.constants:
            return []
        layouts = self.nodes.get(layer.data.name, [])
        return [torch.from_numpy(slots) for slots in slots_of(layouts[layer.summed], group.axis)]

    def _note(self, group: Group, reader: Reader, channels: Tensor) -> None:
        """Note what constant channels add to a layer's output."""
        layer = self.layers[reader.parameter]
        constant_positions = torch.zeros(
            self.constants[reader.parameter].shape[layer.summed], dtype=torch.bool
        )
        for slots in self._occurrences(group, reader):
            # -1, another group's position, reads the last channel here and is masked.
            constant_positions |= (slots >= 0) & channels[slots]
        data = self.constants[reader.parameter].movedim(layer.summed, -1)
        data = (
            torch.where(constant_positions.to(data.device), data, 0.0)
            .movedim(-1, layer.summed)
            .double()
        )
        weight = tensor_read_by(self.graph_module, layer.weight).double()
        added = layer.value(data, weight, None, layer.arguments({}))
        # [outputs]: without padding the same at every position, so the first stands for all
        by_channel = added.movedim(layer.summed, 0).flatten(1)[:, 0]
        self.extra[reader.parameter] = self.extra.get(reader.parameter, 0.0) + by_channel

    def add_to_biases(self) -> None:
        """Give the layers what was noted."""
        for name, extra in self.extra.items():
            layer = self.layers[name]
            old_bias = tensor_read_by(self.graph_module, layer.bias).double() if layer.bias else 0.0
            put_bias(self.graph_module, layer, old_bias + extra)
        self.graph_module.recompile()


def _computes_arguments(layer: Layer) -> bool:
    """Say whether the layer is called with more that is computed than its tensors."""
    return not {layer.data, layer.weight, layer.bias}.issuperset(layer.node.all_input_nodes)
