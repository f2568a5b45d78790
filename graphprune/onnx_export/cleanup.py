"""What PyTorch's exporter leaves in an ONNX model: checks, lengths written down, names of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

aten = torch.ops.aten


def remove_assertions(program: torch.export.ExportedProgram) -> None:
    """Take out the checks of values that a model makes (`torch._check`), and what is only for them."""
    graph = program.graph_module.graph
    # Backwards, so that what an assertion alone reads has no user left when its turn comes.
    for node in reversed(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _ASSERTIONS or not (node.users or node.is_impure()):
            graph.erase_node(node)
    program.graph_module.recompile()


_ASSERTIONS = (aten._assert_async, aten._assert_scalar, aten._assert_tensor_metadata)


def free_lengths(model: ir.Model) -> None:
    """Let recurrent layers join their directions at any length: the exporter writes down the traced one."""
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] else None
        if source is None or source.op_type != "Transpose" or source.inputs[0] is None:
            continue
        layer = source.inputs[0].producer()
        if layer is None or layer.op_type not in ("LSTM", "GRU", "RNN"):
            continue
        if source.inputs[0] is layer.outputs[0]:  # [time, direction, batch, unit], the two swapped
            # The Reshape to [time, batch, direction * unit] has the traced time and batch as numbers.
            name = f"{node.outputs[0].name}_shape"
            shape = ir.Value(name=name, const_value=ir.tensor([0, 0, -1], ir.DataType.INT64, name))
            model.graph.register_initializer(shape)
            node.replace_input_with(1, shape)
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)  # 0 is "as it is"
    RemoveUnusedNodesPass()(model)


def rename_symbols(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """Return a dimension with its symbols renamed."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    # `(?!)` matches nothing; a dimension may be a formula of symbols, such as `2*s0 + 1`.
    symbols = "|".join(map(re.escape, names)) or "(?!)"
    return re.sub(rf"\b({symbols})\b", lambda match: names[match[0]], str(dim))


def values_of(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs, weights and results of a graph and the graphs in its nodes, each once."""
    results = [value for node in graph.all_nodes() for value in node.outputs]
    inner = [value for subgraph in graph.subgraphs() for value in subgraph.inputs]
    return list(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *inner, *results]))


def tidy(model: ir.Model, inputs: list[str], outputs: list[str], prefix: str) -> None:
    """Name inputs, outputs and weights as the caller does; drop stack traces and local paths.

    Args:
        model: of which all values get names.
        inputs: names of its inputs.
        outputs: of its outputs, as they are reached in what the model returns: `output['logits']`.
        prefix: what the names of weights begin with, and no longer do then.

    """
    graph = model.graph
    ends = [*graph.inputs, *graph.outputs]
    inner = [value for value in values_of(graph) if value not in ends]
    # First those that the caller knows: a weight of the same name gets the number.
    names = _make_unique([*inputs, *map(_output_name, outputs)], set())
    names += _make_unique([str(value.name).removeprefix(prefix) for value in inner], set(names))
    for value, name in zip([*ends, *inner], names, strict=True):
        value.name = name
    carriers: list[ir.Model | ir.Graph | ir.Node | ir.Value]
    carriers = [model, graph, *graph.all_nodes(), *ends, *inner]
    for carrier in carriers:
        carrier.metadata_props.clear()
        carrier.doc_string = None


def _make_unique(names: Iterable[str], taken: set[str]) -> list[str]:
    """Return the names, those already taken or given before with _2, _3... at the end."""
    unique: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in taken))
        taken.add(unique[-1])
    return unique


def _output_name(name: str) -> str:
    """Return an output's name as an identifier: `output['logits']` is logits."""
    # `output[0]` keeps its first word, since 0 alone is no identifier: output_0.
    words = re.findall(r"\w+", name)
    return "_".join(words[1:] if len(words) > 1 and not words[1].isdigit() else words)
