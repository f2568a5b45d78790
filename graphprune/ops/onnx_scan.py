"""A recurrent layer whose matrices are packed, in standard operators of ONNX.

Feature-major, with weights on the left of batched products, which ONNX Runtime would not pack beforehand
anyway; one Scan over time, so that length and batch stay free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape
from onnxscript import evaluator

from graphprune.ops.block_sparse_recurrent import GATES, OPERATOR

Matrix: TypeAlias = tuple[ir.Value, ir.Value | None]
"""Blocks and places, or a matrix whole and None."""

_BODY = "graphprune_step_"  # what the names of values in a Scan begin with: unlike those outside


@dataclass
class Writer:
    """Writes the nodes of one graph, in order."""

    tape: Tape = field(default_factory=Tape)

    def __call__(
        self, kind: str, *inputs: ir.Value | Sequence[int] | None, **attributes: Any
    ) -> ir.Value:
        """Write a node of one output; sequences of integers are constants."""
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(
        self, kind: str, count: int, *inputs: ir.Value | Sequence[int] | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Write a node of several outputs."""
        values = [
            operand if operand is None or isinstance(operand, ir.Value) else self._constant(operand)
            for operand in inputs
        ]
        return self.tape.op_multi_out(kind, values, attributes, num_outputs=count)

    def _constant(self, numbers: Sequence[int]) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})

    def parts(self, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
        """Write a split of the first dimension."""
        return self.several("Split", len(sizes), value, list(sizes), axis=0)


def _gru(op: Writer, data: ir.Value, state: ir.Value, old: Sequence[ir.Value]) -> list[ir.Value]:
    size = _height(old[0])
    state_gates, state_new = op.parts(state, (2 * size, size))
    gates, new = op.parts(data, (2 * size, size))
    reset, update = op.parts(op("Sigmoid", op("Add", gates, state_gates)), (size, size))
    new = op("Tanh", op("Add", new, op("Mul", reset, state_new)))
    return [op("Add", new, op("Mul", update, op("Sub", old[0], new)))]


def _lstm(op: Writer, data: ir.Value, state: ir.Value, old: Sequence[ir.Value]) -> list[ir.Value]:
    size = _height(old[0])
    # Gates stand as in torch.nn: i f g o.
    enter_forget, candidate, leave = op.parts(op("Add", data, state), (2 * size, size, size))
    enter, forget = op.parts(op("Sigmoid", enter_forget), (size, size))
    added = op("Mul", enter, op("Tanh", candidate))
    cell = op("Add", op("Mul", forget, old[1]), added)
    return [op("Mul", op("Sigmoid", leave), op("Tanh", cell)), cell]


_STEPS: dict[str, Callable[[Writer, ir.Value, ir.Value, Sequence[ir.Value]], list[ir.Value]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda op, data, state, _: [op("Tanh", op("Add", data, state))],
    "rnn_relu": lambda op, data, state, _: [op("Relu", op("Add", data, state))],
}


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape)  # type: ignore[arg-type]


def _height(state: ir.Value) -> int:
    return _shape(state)[0]


def write_product(op: Writer, matrix: Matrix, data: ir.Value, gates: int, height: int) -> ir.Value:
    """Write the product of a matrix and `[width, count]`; return `[gates * height, count]`."""
    blocks, places = matrix
    if places is None:
        return op("MatMul", blocks, data)
    block_rows, block_height, block_width = _shape(blocks)
    # The columns of a block: blocks are [block rows, rows, blocks of a row * run], each with a place.
    run = block_width * block_rows // prod(_shape(places))
    # [width, count] -> [runs, run * count] -> [block rows, blocks of a row * run, count]
    by_run = op("Reshape", data, (_shape(data)[0] // run, -1))
    gathered = op("Reshape", op("Gather", by_run, places, axis=0), (block_rows, block_width, -1))
    product = op("MatMul", blocks, gathered)
    # [block rows, rows, count]; a gate's last block may reach beyond its height: those rows go.
    if block_rows * block_height != gates * height:
        by_gate = op("Reshape", product, (gates, block_rows * block_height // gates, -1))
        product = op("Slice", by_gate, (0,), (height,), (1,))
    return op("Reshape", product, (gates * height, -1))


def write_recurrent(
    op: Writer,
    data: ir.Value,
    states: Sequence[ir.Value],
    matrices: tuple[Matrix, Matrix],
    biases: tuple[ir.Value | None, ir.Value | None],
    kind: str,
    reverse: bool,
) -> list[ir.Value]:
    """Write the nodes of `graphprune::block_sparse_recurrent`; return its outputs."""
    gates, height = GATES[kind], _height(states[0])
    rows, features = gates * height, _shape(data)[1]
    input_bias, hidden_bias = (
        None if bias is None else op("Unsqueeze", bias, (1,)) for bias in biases
    )
    # [time, features, batch] -> [features, time, batch] -> [features, time * batch]
    flat = op("Reshape", op("Transpose", data, perm=[1, 0, 2]), (features, -1))
    flat.shape, flat.type = ir.Shape([features, None]), data.type
    from_data = write_product(op, matrices[0], flat, gates, height)
    if input_bias is not None:
        from_data = op("Add", from_data, input_bias)
    # [rows, time * batch] -> [rows, time, batch] -> [time, rows, batch], with the batch of the data.
    sizes = op("Concat", (rows, -1), op("Shape", data, start=2), axis=0)
    by_step = op("Transpose", op("Reshape", from_data, sizes), perm=[1, 0, 2])

    inner = Writer()
    old = [ir.Value(shape=ir.Shape([height, None]), type=data.type) for _ in states]
    step = ir.Value(shape=ir.Shape([rows, None]), type=data.type)
    from_state = write_product(inner, matrices[1], old[0], gates, height)
    if hidden_bias is not None:
        from_state = inner("Add", from_state, hidden_bias)
    new = _STEPS[kind](inner, step, from_state, old)
    # The new state goes to the next step and out of this one; one value cannot be both.
    body_outputs = [*new, inner("Identity", new[0])]
    for value in body_outputs:
        value.type, value.shape = data.type, ir.Shape([height, None])
    inner_values = [value for node in inner.tape.nodes for value in node.outputs]
    for number, value in enumerate([*old, step, *inner_values]):
        value.name = f"{_BODY}{number}"
    body = ir.Graph([*old, step], body_outputs, nodes=inner.tape.nodes, name="step")
    directions = {"scan_input_directions": [1], "scan_output_directions": [1]} if reverse else {}
    *last_states, output = op.several(
        "Scan", len(states) + 1, *states, by_step, body=body, num_scan_inputs=1, **directions
    )
    return [output, *last_states]


def _translate(
    data: ir.Value,
    states: Sequence[ir.Value],
    input_blocks: ir.Value,
    input_places: ir.Value | None,
    hidden_blocks: ir.Value,
    hidden_places: ir.Value | None,
    input_bias: ir.Value | None,
    hidden_bias: ir.Value | None,
    kind: str,
    reverse: bool,
) -> list[ir.Value]:
    """Write the operator into the graph that the exporter is recording."""
    op = Writer()
    matrices = (input_blocks, input_places), (hidden_blocks, hidden_places)
    outputs = write_recurrent(op, data, states, matrices, (input_bias, hidden_bias), kind, reverse)
    evaluator.default().nodes.extend(op.tape.nodes)  # type: ignore[attr-defined]
    return outputs


TRANSLATIONS: dict[Any, Callable[..., Any]] = {OPERATOR.default: _translate}
"""For `torch.onnx.export(..., custom_translation_table=)`."""
