"""A graph running on one batch, one node at a time, so that many batches can keep in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphprune.errors import InvalidRequestError, in_a_line
from graphprune.inference.interpreter import flatten_arguments
from graphprune.utils.inputs import Inputs


class Run(fx.Interpreter):
    """A graph on the way through its nodes, in a given order.

    Values are let go after their last use, unless they are to be kept.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Inputs,
        order: Sequence[fx.Node],
        *,
        keep: bool = False,
        what: str = "a batch of data",
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        copied_inputs = inputs.map(torch.clone)  # operators may write over them
        flat = flatten_arguments(graph_module, copied_inputs)
        expected = len(graph_module.graph.find_nodes(op="placeholder"))
        if len(flat) != expected:
            raise InvalidRequestError(
                f"{what} gives {inputs}, {len(flat)} arguments where the traced model takes "
                f"{expected}; batches need the form of example_inputs, positional or by name alike"
                f"{several_inputs(len(flat), expected)}"
            )
        self.args_iter = iter(flat)
        self.inputs, self.what = inputs, what
        self.order = order
        self.place = 0
        # By what is used: a later reader takes the place of an earlier one, so the last one stays.
        self.last_use = (
            {} if keep else {used: node for node in order for used in node.all_input_nodes}
        )

    def until(self, node: fx.Node, *, inclusive: bool = False) -> Any:
        """Run every node before this one, and it too if `inclusive`; return its value then."""
        while self.order[self.place] is not node:
            self._advance()
        return self._advance() if inclusive else None

    def is_past(self, node: fx.Node) -> bool:
        """Say whether the node has run."""
        return self.order.index(node) < self.place

    def _advance(self) -> Any:
        node = self.order[self.place]
        self.place += 1
        try:
            value = self.env[node] = self.run_node(node)
        except Exception as failure:
            raise InvalidRequestError(
                f"the model does not run on {self.what}, {self.inputs}: {in_a_line(failure)}; batches "
                "need the form of example_inputs, and their sizes where tracing left none free"
            ) from failure
        for used in node.all_input_nodes:
            if self.last_use.get(used) is node:
                self.env.pop(used, None)
        return value


def several_inputs(passed: int, expected: int) -> str:
    """Return the end of a message: how several inputs are passed, where fewer were than are expected."""
    if passed >= expected:
        return ""
    return "; a pair (a, b) is an input and a target, two inputs are graphprune.Inputs(a, b)"
