"""Remove what does nothing in inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphprune.pipeline.pipeline import Pass, Program
from graphprune.rules import arguments_of, writes

aten = torch.ops.aten

_DROPOUTS = (
    aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.feature_alpha_dropout,
    aten.dropout_, aten.alpha_dropout_, aten.feature_dropout_, aten.feature_alpha_dropout_,
)  # fmt: skip
_COPIES = (aten.clone, aten.alias, aten.detach, aten.lift_fresh)


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Operators that give their input back in inference go: what read them reads their input.

    1. Dropout of every kind; in training the graph does what it does in evaluation.
    2. Copies and aliases, where no operator of the graph writes over a value.

    Left alone: copies into another memory format, which a view behind them may need, and copies of an
    input or a parameter that the model gives back, since the caller may write over them.
    """

    def rewrite(self, program: Program) -> bool:
        """Bypass each of them."""
        graph = program.graph_module.graph
        identities = [node for node in graph.nodes if _is_dropout(node)]
        other_nodes = [node for node in graph.nodes if node not in identities]
        # Without a copy, what is written to the one would be seen in the other; dropouts are going anyway.
        if not any(map(writes, other_nodes)):
            identities += [node for node in other_nodes if _is_copy(node)]
        for node in identities:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        for flag in graph.find_nodes(op="get_attr", target="training"):
            if not flag.users:
                graph.erase_node(flag)
        return bool(identities)


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _is_dropout(node: fx.Node) -> bool:
    return _packet(node) in _DROPOUTS


def _is_copy(node: fx.Node) -> bool:
    if _packet(node) not in _COPIES:
        return False
    arguments = arguments_of(node)
    source = node.args[0]
    is_handed_out = any(reader.op == "output" for reader in node.users)
    is_callers = isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr")
    keeps_format = arguments.get("memory_format") in (None, torch.preserve_format)
    return keeps_format and not (is_handed_out and is_callers)
