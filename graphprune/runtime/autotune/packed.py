"""Recurrent and linear layers, dense and packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from graphprune.onnx_export.providers import Runtime
from graphprune.ops.block_packing import Packed
from graphprune.ops.onnx_scan import Matrix, Writer, write_product, write_recurrent
from graphprune.runtime.autotune import IR_VERSION, OPSET, benchmark_variants

_DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
}


@dataclass(frozen=True)
class MatrixShape:
    """A matrix and how it is packed.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        blocks: of `Packed.blocks`, None where it stays whole.
        places: how many.

    """

    rows: int
    columns: int
    blocks: tuple[int, ...] | None = None
    places: int = 0

    @classmethod
    def of(cls, matrix: Tensor, packed: Packed | None) -> MatrixShape:
        """Return the shape of a matrix that is packed so, or whole."""
        rows, columns = matrix.shape
        if packed is None:
            return cls(rows, columns)
        return cls(rows, columns, tuple(packed.blocks.shape), len(packed.places))


@dataclass(frozen=True)
class RecurrentShape:
    """What the time of a recurrent layer in one direction depends on."""

    kind: str
    time: int
    batch: int
    input: MatrixShape
    hidden: MatrixShape
    biases: bool

    def times(self, runtime: Runtime) -> dict[str, float]:
        """Return the seconds of the "dense" and the "packed" form."""
        shape = self.time, self.batch, self.input.columns
        return _times(shape, {"dense": self._write_dense, "packed": self._write_packed}, runtime)

    def _write_dense(self, model: _Model) -> ir.Value:
        kind, options = _DENSE[self.kind]
        weights = [model.weight(1, m.rows, m.columns) for m in (self.input, self.hidden)]
        # ONNX has the biases of the input's matrix and of the state's side by side.
        biases = [model.weight(1, 2 * self.input.rows)] if self.biases else []
        options = {"hidden_size": self.hidden.columns, **options}
        return model.op.several(kind, 1, model.x, *weights, *biases, **options)[0]

    def _write_packed(self, model: _Model) -> ir.Value:
        height, rows = self.hidden.columns, self.hidden.rows
        # The packed form is feature-major: [time, batch, features] to [time, features, batch] and back.
        data = model.op("Transpose", model.x, perm=[0, 2, 1])
        # An LSTM has a cell beside the hidden state.
        states = [model.weight(height, self.batch) for _ in range(1 + (self.kind == "lstm"))]
        biases = [model.weight(rows) if self.biases else None for _ in range(2)]
        output, *_ = write_recurrent(
            model.op,
            model.set_type(data, self.time, self.input.columns, self.batch),
            states,
            (model.matrix(self.input), model.matrix(self.hidden)),
            (biases[0], biases[1]),
            self.kind,
            reverse=False,
        )
        return model.op("Transpose", output, perm=[0, 2, 1])


@dataclass(frozen=True)
class LinearShape:
    """What the time of a linear layer depends on; `count` vectors are multiplied at once."""

    count: int
    matrix: MatrixShape

    def times(self, runtime: Runtime) -> dict[str, float]:
        """Return the seconds of the "dense" and the "packed" form."""
        shape = self.count, self.matrix.columns
        return _times(shape, {"dense": self._write_dense, "packed": self._write_packed}, runtime)

    def _write_dense(self, model: _Model) -> ir.Value:
        return model.op("MatMul", model.x, model.weight(self.matrix.columns, self.matrix.rows))

    def _write_packed(self, model: _Model) -> ir.Value:
        data = model.op("Transpose", model.x, perm=[1, 0])
        data = model.set_type(data, self.matrix.columns, self.count)
        product = write_product(model.op, model.matrix(self.matrix), data, 1, self.matrix.rows)
        return model.op("Transpose", product, perm=[1, 0])


class _Model:
    """A small model that is being written."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.op = Writer()
        self.x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.weights: list[ir.Value] = []

    def set_type(self, value: ir.Value, *shape: int) -> ir.Value:
        """Say of a value what the writer of packed layers asks for."""
        value.shape, value.type = ir.Shape(shape), self.x.type
        return value

    def weight(self, *shape: int) -> ir.Value:
        """Hold some numbers of that shape."""
        numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        # Divided by the width, so that sums over it stay small, through all steps of a recurrence too.
        return self._hold(numbers / shape[-1])

    def matrix(self, shape: MatrixShape) -> Matrix:
        """Hold a matrix, packed or whole."""
        if shape.blocks is None:
            return self.weight(shape.rows, shape.columns), None
        # A row of blocks holds blocks[2] columns in places / blocks[0] blocks, each a run of columns wide.
        # Runs are read 7 apart: in order, they would be read faster than those of a trained layer.
        runs = shape.columns // (shape.blocks[2] * shape.blocks[0] // shape.places)
        return self.weight(*shape.blocks), self._hold(np.arange(shape.places) * 7 % runs)

    def _hold(self, array: np.ndarray) -> ir.Value:
        name = f"weight_{len(self.weights)}"
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.tensor(array).dtype),
            const_value=ir.tensor(array, name=name),
        )
        self.weights.append(value)
        return value

    def proto(self, output: ir.Value) -> onnx.ModelProto:
        """Return the model."""
        output.type = self.x.type
        graph = ir.Graph(
            [self.x], [output], nodes=self.op.tape.nodes, initializers=self.weights,
            opset_imports={"": OPSET}, name="race",
        )  # fmt: skip
        return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))


def _times(
    shape: tuple[int, ...], forms: dict[str, Callable[[_Model], ir.Value]], runtime: Runtime
) -> dict[str, float]:
    models = {}
    for name, write_form in forms.items():
        model = _Model(shape)
        models[name] = model.proto(write_form(model))
    feed: dict[str, Any] = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    return benchmark_variants(models, feed, runtime)
