"""Change the weights of a slim graph so that it does what the original did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from graphprune.calibration.batches import batches_of
from graphprune.compensation import Method, compensate_model, method_of
from graphprune.distributed.process_group import join_call
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.selection.plan import Plan


@dataclass(frozen=True)
class Compensate(Pass):
    """The repair of `graphprune.slim(compensate=True)` by itself, for a graph that was slimmed before.

    1. Weights and biases of convolution, linear and recurrent layers are fitted, one layer after the
       other, to what the original gave for the channels that stay.
    2. Batch norms that follow them get the statistics of their new inputs.

    Left alone: weights that several operators read.

    Attributes:
        original: the model before it was slimmed.
        plan: what was cut.
        data: a few hundred samples in batches, without targets or with.
        method: "least_squares", or "constants" for biases alone.

    """

    original: nn.Module
    plan: Plan
    data: Any
    method: Method = "least_squares"

    def rewrite(self, program: Program) -> bool:
        """Fit the layers of the graph."""
        method = method_of(self.method)
        if method is None:
            return False
        with join_call():
            compensation = compensate_model(
                self.original,
                program.graph_module,
                self.plan,
                program.inputs,
                batches_of(self.data),
                method,
            )
        return any(layer.after < layer.before for layer in compensation.layers)
