"""Turn blocks of zeros in recurrent layers into time and memory that are saved."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphprune.graph_utils.edits import drop_unread, read_packed
from graphprune.graph_utils.linear_layers import tensor_read_by
from graphprune.inference.infer import infer
from graphprune.layout import size_of
from graphprune.onnx_export.providers import Runtime
from graphprune.ops.block_packing import Block, Packed, has_zeros, pack_if_smaller
from graphprune.ops.block_sparse_recurrent import OPERATOR
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.rules import arguments_of
from graphprune.rules.recurrent import GATES
from graphprune.runtime.autotune import warn_of_isolated_zeros, warn_of_slow
from graphprune.runtime.autotune.packed import MatrixShape, RecurrentShape

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerSparseRecurrent(Pass):
    """Recurrent layers whose matrices are zero but for some blocks compute those blocks alone.

    1. Blocks are packed, as many for each row of blocks: `SparseRecurrent`, or
       `graphprune.GradualSparsity(block=, balanced=True)`, leaves them so. Their products are batched
       products of matrices.
    2. In PyTorch a layer becomes one operator for each direction, which torch.compile takes as it is; in
       the file of `graphprune.export` a Scan of standard operators, with the length and the batch as free
       as they were. (torch.onnx.export writes it with `custom_translation_table=TRANSLATIONS` of
       graphprune.ops.onnx_scan.)

    Left alone, with a warning: layers that run no faster in ONNX Runtime at the example inputs' shape, by
    measurement, and layers whose zeros stand alone. Without one: layers that are dense, cells, and layers
    with projections.

    The graph computes what it did, to rounding.

    Attributes:
        block: rows and columns of the blocks; found from the zeros by default.
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
        """Lower each recurrent layer that gains from it."""
        graph_module = program.graph_module
        inference = infer(graph_module, program.inputs)
        runtime = Runtime.of(self.provider, self.threads)
        race = functools.cache(lambda shape: shape.times(runtime))
        slow, scattered, lowered = [], [], []
        for node in graph_module.graph.nodes:
            stack = _Stack.of(graph_module, node, self.block)
            if stack is None:
                continue
            if not any(cell.is_packed for cell in stack.cells):
                scattered += [stack.name] if stack.has_zeros else []
                continue
            if self.measured:
                sizes = [size_of(layout) for layout in inference.nodes[stack.data.name]]
                times = [race(shape) for shape in stack.shapes(sizes)]
                if sum(t["packed"] for t in times) >= sum(t["dense"] for t in times):
                    slow.append(stack.name)
                    continue
            lowered.append(stack)
        for stack in lowered:
            stack.lower()
        drop_unread(graph_module, {name for stack in lowered for name in stack.weights})
        warn_of_slow("recurrent layers", slow, runtime)
        warn_of_isolated_zeros("recurrent layers", scattered)
        return bool(lowered)


@dataclass(frozen=True)
class _Cell:
    """One layer in one direction: its matrices, packed or None where they stay whole, and its biases."""

    matrices: Sequence[fx.Node]
    packed: Sequence[Packed | None]
    biases: Sequence[fx.Node | None]
    reverse: bool

    @property
    def is_packed(self) -> bool:
        """Whether a matrix of it is."""
        return any(packed is not None for packed in self.packed)


@dataclass(frozen=True)
class _Stack:
    """A call of a recurrent operator: layers one on the other, in one direction or both."""

    graph_module: fx.GraphModule
    node: fx.Node
    given: dict[str, Any]
    cells: Sequence[_Cell]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, node: fx.Node, block: Block | None) -> _Stack | None:
        """Return the call that a node is; None of other nodes, packed sequences and projections."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in GATES or node.target is not packet.input:
            return None
        arguments = arguments_of(node)
        directions = 2 if arguments["bidirectional"] else 1
        count = 4 if arguments["has_biases"] else 2
        reads = arguments["params"]
        if len(reads) != directions * arguments["num_layers"] * count:
            return None
        cells = []
        # By layer, then direction: input weight, state weight and, if any, their biases.
        for start in range(0, len(reads), count):
            weights, biases = (
                reads[start : start + 2],
                [*reads[start + 2 : start + count], None, None],
            )
            packed = [
                pack_if_smaller(tensor_read_by(graph_module, w), GATES[packet], block)
                for w in weights
            ]
            is_reverse = bool(start // count % directions)
            cells.append(_Cell(weights, packed, biases[:2], is_reverse))
        return cls(graph_module, node, arguments, cells)

    @property
    def name(self) -> str:
        """The name of the first matrix."""
        return str(self.cells[0].matrices[0].target)

    @property
    def data(self) -> fx.Node:
        """What it is called on."""
        node: fx.Node = self.given["input"]
        return node

    @property
    def kind(self) -> str:
        """Which operator."""
        name: str = self.node.target.overloadpacket.__name__  # type: ignore[union-attr]
        return name

    @property
    def weights(self) -> set[str]:
        """The names of the matrices that are packed."""
        return {
            str(read.target)
            for cell in self.cells
            for read, packed in zip(cell.matrices, cell.packed, strict=True)
            if packed is not None
        }

    @property
    def has_zeros(self) -> bool:
        """Whether most of a matrix is zero."""
        reads = (read for cell in self.cells for read in cell.matrices)
        return any(has_zeros(tensor_read_by(self.graph_module, read)) for read in reads)

    def shapes(self, sizes: Sequence[int]) -> Iterator[RecurrentShape]:
        """Yield what the time of each cell depends on, for data of those sizes."""
        batch, time = sizes[:2] if self.given["batch_first"] else (sizes[1], sizes[0])
        for cell in self.cells:
            input_shape, hidden_shape = (
                MatrixShape.of(tensor_read_by(self.graph_module, read), packed)
                for read, packed in zip(cell.matrices, cell.packed, strict=True)
            )
            has_biases = self.given["has_biases"]
            yield RecurrentShape(self.kind, time, batch, input_shape, hidden_shape, has_biases)

    def lower(self) -> None:
        """Put an operator for each cell in its place; time first, then features, then the batch."""
        graph, call = self.graph_module.graph, self.graph_module.graph.call_function
        states = self.given["hx"] if self.kind == "lstm" else [self.given["hx"]]
        batch_first = self.given["batch_first"]
        directions = 2 if self.given["bidirectional"] else 1
        # Each takes one output by its number: 0 all states, 1 the last one, 2 the last of an LSTM's cell.
        users = list(self.node.users)
        last_states: dict[Any, list[fx.Node]] = {
            user.args[1]: [] for user in users if user.users and user.args[1]
        }
        with graph.inserting_before(self.node):
            order = [1, 2, 0] if batch_first else [0, 2, 1]
            sequence = call(aten.permute.default, (self.data, order))  # [time, features, batch]
            for layer in range(self.given["num_layers"]):
                if layer and self.given["dropout"]:
                    dropped = (sequence, self.given["dropout"], self.given["train"])
                    sequence = call(aten.dropout.default, dropped)
                outputs = []
                for number in range(layer * directions, (layer + 1) * directions):
                    # [cells, batch, hidden] -> [batch, hidden] -> [hidden, batch].
                    start_states = [
                        call(aten.t.default, (call(aten.select.int, (state, 0, number)),))
                        for state in states
                    ]
                    results = call(
                        OPERATOR.default, self._arguments(number, sequence, start_states)
                    )
                    results.meta = {k: v for k, v in self.node.meta.items() if k != "val"}
                    outputs.append(call(operator.getitem, (results, 0)))
                    for output_number, cell_states in last_states.items():
                        cell_states.append(
                            call(
                                aten.t.default, (call(operator.getitem, (results, output_number)),)
                            )
                        )
                # Directions side by side: [time, directions * hidden, batch].
                sequence = outputs[0] if len(outputs) == 1 else call(aten.cat.default, (outputs, 1))
            # [batch, time, features] or [time, batch, features] again.
            order = [2, 0, 1] if batch_first else [0, 2, 1]
            replacements = {0: call(aten.permute.default, (sequence, order))}
            # Of each cell [batch, hidden], stacked: [cells, batch, hidden].
            replacements |= {
                output_number: call(aten.stack.default, (cell_states,))
                for output_number, cell_states in last_states.items()
            }
        for user in users:
            if user.users:
                user.replace_all_uses_with(replacements[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(self.node)

    def _arguments(self, number: int, data: fx.Node, states: list[fx.Node]) -> tuple[Any, ...]:
        """Return the operator's arguments for one cell."""
        cell = self.cells[number]
        matrices: list[fx.Node | None] = []
        for read, packed in zip(cell.matrices, cell.packed, strict=True):
            if packed is None:
                matrices += read, None
            else:
                matrices += read_packed(self.graph_module, read, packed.blocks, packed.places)
        return data, states, *matrices, *cell.biases, self.kind, cell.reverse
