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
from graphprune.graph_utils.linear_layers import held_by
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
        own = [state[self.number : self.number + 1].contiguous() for state in start]
        arguments = (list(parameters), len(parameters) > 2, 1, 0.0, False, False, False)
        first = own if self.packet is aten.lstm else own[0]
        after: Tensor = self.packet.input(data, first, *arguments)[0]
        return torch.cat([own[0], after[:-1]]), after


def recurrent_nodes(graph_module: fx.GraphModule) -> dict[str, list[Cell]]:
    """Return, by the name of the first weight, the cells of each recurrent node that can be repaired.

    Left out are packed sequences, projections, and parameters that something else reads too.
    """
    found = {}
    trainable = parameter_names(graph_module)
    readers: dict[str, set[fx.Node]] = {}
    for read in graph_module.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(read.target), set()).update(read.users)
    for node in graph_module.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in GATES or node.target is not packet.input:
            continue
        given = arguments_of(node)
        names = [str(parameter.target) for parameter in given["params"]]
        each = 4 if given["has_biases"] else 2
        cells = given["num_layers"] * (2 if given["bidirectional"] else 1)
        alone = all(name in trainable and readers[name] == {node} for name in names)
        if len(names) == cells * each and alone:
            found[names[0]] = [
                Cell(node, n, tuple(names[n * each : (n + 1) * each])) for n in range(cells)
            ]
    return found


@dataclass(frozen=True)
class Side:
    """One of the two models: its graph, its runs, standing before the node, and the node's cells."""

    graph_module: fx.GraphModule
    batches: Share
    runs: Sequence[Run]
    cells: Sequence[Cell]

    def inputs(self) -> list[Tensor]:
        """Return the node's input for each run, `[time, batch, features]`."""
        given = arguments_of(self.cells[0].node)
        return [_time_first(run.env[given["input"]], given) for run in self.runs]

    def starts(self) -> list[list[Tensor]]:
        """Return the states before the first step for each run, `[cells, batch, units]`."""
        hx = arguments_of(self.cells[0].node)["hx"]
        nodes = [hx] if isinstance(hx, fx.Node) else list(hx)
        found = [[run.env[node] for node in nodes] for run in self.runs]
        return [[s if s.dim() == 3 else s.unsqueeze(1) for s in states] for states in found]

    def parameters(self, cell: Cell) -> list[Tensor]:
        """Return the cell's parameters."""
        return [_held(self.graph_module, name) for name in cell.names]


def _held(graph_module: fx.GraphModule, name: str) -> Tensor:
    node = next(n for n in graph_module.graph.find_nodes(op="get_attr") if n.target == name)
    return held_by(graph_module, node)


def _time_first(data: Tensor, given: Mapping[str, Any]) -> Tensor:
    if data.dim() == 2:
        return data.unsqueeze(1)
    return data.transpose(0, 1) if given["batch_first"] else data


def repaired_cells(
    wanted: Side,
    given: Side,
    layouts: Mapping[str, Sequence[Layout]],
    masks: Mapping[Axis, Mask],
    *,
    bias_alone: bool,
) -> Iterator[tuple[str, float, float]]:
    """Fit the cells of a node, layer after layer.

    Args:
        wanted: the original.
        given: the slim model; its parameters change.
        layouts: of the original's parameters, by name.
        masks: which slots of each cut axis stay.
        bias_alone: leave the weights as they are.

    Yields:
        A cell's first weight, and the squared error of its states over their square, before and after.

    """
    call = arguments_of(given.cells[0].node)
    directions = 2 if call["bidirectional"] else 1
    its_inputs, my_inputs = wanted.inputs(), given.inputs()
    its_starts, my_starts = wanted.starts(), given.starts()
    for layer in range(call["num_layers"]):
        its_states, my_states = [], []
        for direction in range(directions):
            number = layer * directions + direction
            its, mine = wanted.cells[number], given.cells[number]
            kept = [mask_of(layout, masks) for layout in layouts[its.names[1]]]
            fit = _Fit(
                mine, given.parameters(mine), *map(torch.from_numpy, kept), batches=given.batches
            )
            backward = direction == 1
            teachers = [
                _Teacher.of(its, wanted.parameters(its), _turned(x, backward), start)
                for x, start in zip(its_inputs, its_starts, strict=True)
            ]
            turned = [_turned(x, backward) for x in my_inputs]
            before, after = fit.run(teachers, turned, my_starts, bias_alone=bias_alone)
            yield mine.names[0], before, after
            its_states.append([_turned(teacher.after, backward) for teacher in teachers])
            my_states.append(
                [
                    _turned(fit.states(x, s)[1], backward)
                    for x, s in zip(turned, my_starts, strict=True)
                ]
            )
        its_inputs, my_inputs = (
            [torch.cat(both, -1) for both in zip(*states, strict=True)]
            for states in (its_states, my_states)
        )


def _turned(data: Tensor, backward: bool) -> Tensor:
    return data.flip(0) if backward else data


@dataclass(frozen=True)
class _Teacher:
    """What a cell of the original does on a batch: states, and what its matrices make of them."""

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
        own = [self.states(x, start) for x, start in zip(inputs, starts, strict=True)]
        first = least = self._error(teachers, own)
        best = [parameter.clone() for parameter in self.parameters]
        before = [teacher.before[..., self.units] for teacher in teachers]
        for _ in range(_ROUNDS):
            self._fit(teachers, inputs, before, bias_alone=bias_alone)
            own = [self.states(x, start) for x, start in zip(inputs, starts, strict=True)]
            error = self._error(teachers, own)
            if error < least:
                least, best = error, [parameter.clone() for parameter in self.parameters]
            before = [states[0] for states in own]
        for parameter, values in zip(self.parameters, best, strict=True):
            parameter.copy_(values)
        return first, least

    def _error(self, teachers: Sequence[_Teacher], own: Sequence[tuple[Tensor, Tensor]]) -> float:
        missed = wanted = 0.0
        for batch, teacher, (_, after) in zip(self.batches, teachers, own, strict=True):
            target = teacher.after[..., self.units].double()
            where = f"where {self.cell.names[0]} is fitted"
            refuse_unless_finite(batch, teacher.from_data, where)
            refuse_unless_finite(batch, after - target, where)
            missed += float((after - target).square().sum())
            wanted += float(target.square().sum())
        missed, wanted = map(float, self.batches.total((missed, wanted)))
        return missed / wanted if wanted else 0.0

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
        gates = len(self.rows) // len(self.units)
        apart = self.rows.reshape(gates, -1)[-1].sum() if self.cell.packet is aten.gru else 0
        split = int(self.rows.sum() - apart)
        of_data = [teacher.from_data[..., self.rows] for teacher in teachers]
        of_state = [teacher.from_state[..., self.rows] for teacher in teachers]
        width = inputs[0].shape[-1]
        both = [torch.cat(pair, -1) for pair in zip(inputs, before, strict=True)]
        sums = [(a + b)[..., :split] for a, b in zip(of_data, of_state, strict=True)]
        weights, states = self.parameters[:2]
        bias = self.parameters[2] + self.parameters[3] if self.parameters[2:] else None
        joined = torch.cat([weights, states], 1)[:split]
        change = self._change(both, sums, joined, bias, slice(None, split), bias_alone)
        weights[:split] += change[:, :width]
        states[:split] += change[:, width : joined.shape[1]]
        if bias is not None:
            self.parameters[2][:split] += change[:, -1]
        if not apart:
            return
        for place, (data, target) in enumerate(((inputs, of_data), (before, of_state))):
            weight = self.parameters[place]
            own = self.parameters[2 + place] if bias is not None else None
            rest = [values[..., split:] for values in target]
            change = self._change(data, rest, weight[split:], own, slice(split, None), bias_alone)
            weight[split:] += change[:, : weight.shape[1]]
            if own is not None:
                own[split:] += change[:, -1]

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
        for place, batch, target in zip(self.batches.places, data, targets, strict=True):
            given = F.linear(batch, weight, None if bias is None else bias[rows])
            missing = (target - given).flatten(0, -2).double()
            features = batch.flatten(0, -2).double()
            if bias is not None:
                features = F.pad(features, (0, 1), value=1.0)
            equations.add(
                place,
                partial(features.unsqueeze, 0),
                (missing.mT @ features)[None],
                missing.square().sum(0)[None],
            )
        equations.gather(self.batches)
        if bias_alone and bias is None:
            return torch.zeros_like(weight)
        last = slice(weight.shape[1], None)
        return equations.fit(last if bias_alone else slice(None))[0].to(weight.dtype)
