"""Recurrent layers: their gates are linear in the step's input and in the state before it.

The states of the original, of the units that stay, are both what is aimed at and what the fit takes
the state before to be (teacher forcing); once fitted, the layer runs freely, and is fitted again to
the states that it comes to by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphprune.calibration.batches import Share, refuse_unless_finite
from graphprune.compensation.least_squares import NormalEquations
from graphprune.graph_utils.linear_layers import tensor_read_by
from graphprune.graph_utils.stepwise import Run
from graphprune.layout import Axis, Layout
from graphprune.masks import Mask, mask_of
from graphprune.rules import arguments_of
from graphprune.rules.recurrent import GATES
from graphprune.utils.tensors import parameter_names

aten = torch.ops.aten

# Fits of a layer: to the original's states, then to its own.
_ROUNDS = 3


@dataclass(frozen=True)
class Cell:
    """One layer and direction of a recurrent node.

    Attributes:
        node: the call.
        number: of the cell among its node's.
        names: of its parameters: of inputs, of states, and their biases if there are any.

    """

    node: fx.Node
    number: int
    names: tuple[str, ...]

    @property
    def packet(self) -> Any:
        """The operator, without its overload."""
        return self.node.target.overloadpacket  # type: ignore[union-attr]

    def states(
        self, parameters: Sequence[Tensor], data: Tensor, start: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the states `[time, batch, units]` before each step and after it.

        Args:
            parameters: those of `names`.
            data: `[time, batch, features]`.
            start: the state before the first step, of all cells of the node; for an LSTM two.

        """
        start_states = [state[self.number : self.number + 1].contiguous() for state in start]
        # As a layer by itself: parameters, biases or none, one layer, no dropout, not in training, one
        # direction, time first.
        arguments = (list(parameters), len(parameters) > 2, 1, 0.0, False, False, False)
        hx = start_states if self.packet is aten.lstm else start_states[0]
        after: Tensor = self.packet.input(data, hx, *arguments)[0]
        # Before a step is what was after the one before: [1, batch, units], [time - 1, batch, units].
        return torch.cat([start_states[0], after[:-1]]), after


def find_recurrent_cells(graph_module: fx.GraphModule) -> dict[str, list[Cell]]:
    """Return, by the name of the first weight, the cells of each recurrent node that can be repaired.

    Left out are packed sequences, projections, and parameters that something else reads too.
    """
    cells_by_weight = {}
    trainable = parameter_names(graph_module)
    readers: dict[str, set[fx.Node]] = {}
    for read in graph_module.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(read.target), set()).update(read.users)
    for node in graph_module.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in GATES or node.target is not packet.input:
            continue
        arguments = arguments_of(node)
        names = [str(parameter.target) for parameter in arguments["params"]]
        names_per_cell = 4 if arguments["has_biases"] else 2
        cell_count = arguments["num_layers"] * (2 if arguments["bidirectional"] else 1)
        may_change = all(name in trainable and readers[name] == {node} for name in names)
        # A projection would be one more name a cell.
        if len(names) == cell_count * names_per_cell and may_change:
            cells_by_weight[names[0]] = [
                Cell(
                    node,
                    number,
                    tuple(names[number * names_per_cell : (number + 1) * names_per_cell]),
                )
                for number in range(cell_count)
            ]
    return cells_by_weight


@dataclass(frozen=True)
class ModelSide:
    """One of the two models: its graph, its runs, standing before the node, and the node's cells."""

    graph_module: fx.GraphModule
    batches: Share
    runs: Sequence[Run]
    cells: Sequence[Cell]

    def inputs(self) -> list[Tensor]:
        """Return the node's input for each run, `[time, batch, features]`."""
        arguments = arguments_of(self.cells[0].node)
        return [_put_time_first(run.env[arguments["input"]], arguments) for run in self.runs]

    def starts(self) -> list[list[Tensor]]:
        """Return the states before the first step for each run, `[cells, batch, units]`."""
        hx = arguments_of(self.cells[0].node)["hx"]
        nodes = [hx] if isinstance(hx, fx.Node) else list(hx)
        states_by_run = [[run.env[node] for node in nodes] for run in self.runs]
        # Without a batch the states are [cells, units].
        return [[s if s.dim() == 3 else s.unsqueeze(1) for s in states] for states in states_by_run]

    def parameters(self, cell: Cell) -> list[Tensor]:
        """Return the cell's parameters."""
        return [_read_tensor(self.graph_module, name) for name in cell.names]


def _read_tensor(graph_module: fx.GraphModule, name: str) -> Tensor:
    node = next(n for n in graph_module.graph.find_nodes(op="get_attr") if n.target == name)
    return tensor_read_by(graph_module, node)


def _put_time_first(data: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    if data.dim() == 2:  # [time, features], no batch
        return data.unsqueeze(1)
    return data.transpose(0, 1) if arguments["batch_first"] else data


def repair_cells(
    original: ModelSide,
    slim: ModelSide,
    layouts: Mapping[str, Sequence[Layout]],
    masks: Mapping[Axis, Mask],
    *,
    bias_alone: bool,
) -> Iterator[tuple[str, float, float]]:
    """Fit the cells of a node, layer after layer.

    Args:
        original: the original.
        slim: the slim model; its parameters change.
        layouts: of the original's parameters, by name.
        masks: which slots of each cut axis stay.
        bias_alone: leave the weights as they are.

    Yields:
        A cell's first weight, and the squared error of its states over their square, before and after.

    """
    arguments = arguments_of(slim.cells[0].node)
    directions = 2 if arguments["bidirectional"] else 1
    original_inputs, slim_inputs = original.inputs(), slim.inputs()
    original_starts, slim_starts = original.starts(), slim.starts()
    for layer in range(arguments["num_layers"]):
        original_states, slim_states = [], []
        for direction in range(directions):
            number = layer * directions + direction
            original_cell, slim_cell = original.cells[number], slim.cells[number]
            # Of the state's matrix: rows [gates * units] and columns [units] that stay.
            kept_masks = [mask_of(layout, masks) for layout in layouts[original_cell.names[1]]]
            fit = _Fit(
                slim_cell,
                slim.parameters(slim_cell),
                *map(torch.from_numpy, kept_masks),
                batches=slim.batches,
            )
            backward = direction == 1
            teachers = [
                _Teacher.of(
                    original_cell, original.parameters(original_cell), _turn_if(x, backward), start
                )
                for x, start in zip(original_inputs, original_starts, strict=True)
            ]
            turned_inputs = [_turn_if(x, backward) for x in slim_inputs]
            before, after = fit.run(teachers, turned_inputs, slim_starts, bias_alone=bias_alone)
            yield slim_cell.names[0], before, after
            original_states.append([_turn_if(teacher.after, backward) for teacher in teachers])
            # What the next layer will read of this one as it is fitted, not as it is aimed to be.
            slim_states.append(
                [
                    _turn_if(fit.states(x, s)[1], backward)
                    for x, s in zip(turned_inputs, slim_starts, strict=True)
                ]
            )
        # Both directions side by side: [time, batch, directions * units].
        original_inputs, slim_inputs = (
            [torch.cat(by_direction, -1) for by_direction in zip(*states, strict=True)]
            for states in (original_states, slim_states)
        )


def _turn_if(data: Tensor, backward: bool) -> Tensor:
    return data.flip(0) if backward else data


@dataclass(frozen=True)
class _Teacher:
    """What a cell of the original does on a batch: states, and what its matrices make of them.

    Shapes: `[time, batch, units]` for states, `[time, batch, gates * units]` for what is made.
    """

    before: Tensor
    after: Tensor
    from_data: Tensor
    from_state: Tensor

    @classmethod
    def of(
        cls, cell: Cell, parameters: Sequence[Tensor], data: Tensor, start: Sequence[Tensor]
    ) -> _Teacher:
        before, after = cell.states(parameters, data, start)
        biases: Sequence[Tensor | None] = parameters[2:] or (None, None)
        return cls(
            before,
            after,
            F.linear(data, parameters[0], biases[0]),
            F.linear(before, parameters[1], biases[1]),
        )


class _Fit:
    """A cell of the slim model on its way to the weights that fit."""

    def __init__(
        self, cell: Cell, parameters: list[Tensor], rows: Tensor, units: Tensor, *, batches: Share
    ) -> None:
        self.cell, self.parameters, self.rows, self.units = cell, parameters, rows, units
        self.batches = batches

    def states(self, data: Tensor, start: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.cell.states(self.parameters, data, start)

    def run(
        self,
        teachers: Sequence[_Teacher],
        inputs: Sequence[Tensor],
        starts: Sequence[Sequence[Tensor]],
        *,
        bias_alone: bool,
    ) -> tuple[float, float]:
        """Fit, and keep the best of several fits; return the error of the states before and after."""
        slim_states = [self.states(x, start) for x, start in zip(inputs, starts, strict=True)]
        first_error = least = self._error(teachers, slim_states)
        best_parameters = [parameter.clone() for parameter in self.parameters]
        # First the original's states of the units that stay, then those that the fitted cell comes to.
        before = [teacher.before[..., self.units] for teacher in teachers]
        for _ in range(_ROUNDS):
            self._fit(teachers, inputs, before, bias_alone=bias_alone)
            slim_states = [self.states(x, start) for x, start in zip(inputs, starts, strict=True)]
            error = self._error(teachers, slim_states)
            if error < least:
                least, best_parameters = (
                    error,
                    [parameter.clone() for parameter in self.parameters],
                )
            before = [states[0] for states in slim_states]
        for parameter, values in zip(self.parameters, best_parameters, strict=True):
            parameter.copy_(values)
        return first_error, least

    def _error(
        self, teachers: Sequence[_Teacher], slim_states: Sequence[tuple[Tensor, Tensor]]
    ) -> float:
        squared_error = squared_target = 0.0
        for batch, teacher, (_, after) in zip(self.batches, teachers, slim_states, strict=True):
            target = teacher.after[..., self.units].double()  # [time, batch, kept units]
            where = f"where {self.cell.names[0]} is fitted"
            refuse_unless_finite(batch, teacher.from_data, where)
            refuse_unless_finite(batch, after - target, where)
            squared_error += float((after - target).square().sum())
            squared_target += float(target.square().sum())
        squared_error, squared_target = map(
            float, self.batches.total((squared_error, squared_target))
        )
        return squared_error / squared_target if squared_target else 0.0

    def _fit(
        self,
        teachers: Sequence[_Teacher],
        inputs: Sequence[Tensor],
        before: Sequence[Tensor],
        *,
        bias_alone: bool,
    ) -> None:
        """Fit to the gates of the original, given the states before each step.

        All gates see the sum of what input and state give, but for the last of a GRU, which sees the
        one by itself and the other through a gate.
        """
        # A GRU of units a, b has rows ra rb za zb na nb. With x the input and h the state, r and z see
        # W x + U h, so W and U are fitted at once, as [W U], to the sum. But n sees W x + r * (U h), so
        # its W is fitted to W x and its U to U h. If b goes, rows is 10 10 10: two joint, one apart.
        gates = len(self.rows) // len(self.units)
        apart_rows = self.rows.reshape(gates, -1)[-1].sum() if self.cell.packet is aten.gru else 0
        split = int(self.rows.sum() - apart_rows)
        # [time, batch, kept rows], gate above gate, as in the slim model's matrices.
        of_data = [teacher.from_data[..., self.rows] for teacher in teachers]
        of_state = [teacher.from_state[..., self.rows] for teacher in teachers]
        width = inputs[0].shape[-1]
        # [time, batch, features + units]
        joint_features = [torch.cat(pair, -1) for pair in zip(inputs, before, strict=True)]
        # [time, batch, joint rows]
        joint_targets = [(a + b)[..., :split] for a, b in zip(of_data, of_state, strict=True)]
        input_weight, state_weight = self.parameters[:2]
        # Both biases go into the sum, so one of them takes the change.
        bias = self.parameters[2] + self.parameters[3] if self.parameters[2:] else None
        # [joint rows, features + units]; the change has one more column, of the bias.
        joint_weight = torch.cat([input_weight, state_weight], 1)[:split]
        change = self._change(
            joint_features, joint_targets, joint_weight, bias, slice(None, split), bias_alone
        )
        input_weight[:split] += change[:, :width]
        state_weight[:split] += change[:, width : joint_weight.shape[1]]
        if bias is not None:
            self.parameters[2][:split] += change[:, -1]
        if not apart_rows:
            return
        for number, (features, gate_values) in enumerate(((inputs, of_data), (before, of_state))):
            weight = self.parameters[number]
            operand_bias = self.parameters[2 + number] if bias is not None else None
            # [time, batch, rows apart]
            apart_targets = [values[..., split:] for values in gate_values]
            change = self._change(
                features,
                apart_targets,
                weight[split:],
                operand_bias,
                slice(split, None),
                bias_alone,
            )
            weight[split:] += change[:, : weight.shape[1]]
            if operand_bias is not None:
                operand_bias[split:] += change[:, -1]

    def _change(
        self,
        data: Sequence[Tensor],
        targets: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        rows: slice,
        bias_alone: bool,
    ) -> Tensor:
        """Return the change of a weight, and of its bias as a last column, in its own precision."""
        equations = NormalEquations()
        for number, batch, target in zip(self.batches.places, data, targets, strict=True):
            # [time, batch, features] -> [time, batch, rows]; the weight has these rows, the bias all.
            output = F.linear(batch, weight, None if bias is None else bias[rows])
            missing = (target - output).flatten(0, -2).double()  # [samples, rows]
            features = batch.flatten(0, -2).double()  # [samples, features]
            if bias is not None:
                features = F.pad(features, (0, 1), value=1.0)  # [samples, features + 1]
            equations.add(
                number,
                partial(features.unsqueeze, 0),  # [1, samples, features]
                (missing.mT @ features)[None],  # [1, rows, features]
                missing.square().sum(0)[None],  # [1, rows]
            )
        equations.gather(self.batches)
        if bias_alone and bias is None:
            return torch.zeros_like(weight)
        bias_column = slice(weight.shape[1], None)
        return equations.fit(bias_column if bias_alone else slice(None))[0].to(weight.dtype)
