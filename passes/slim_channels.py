"""Remove channels from a graph, with everything that must go along with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from graphprune.compensation import Method
from graphprune.importance import Importance, Loss
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.selection.allocation import Align
from graphprune.selection.request import Ranking, Unit
from graphprune.slimming.slim import slimmed


@dataclass(frozen=True)
class SlimChannels(Pass):
    """`graphprune.slim` as a pass: the same choice, the same check, on a graph.

    1. Parameters and buffers lose the removed slots.
    2. Sizes in the graph (views, splits, slices, norm shapes, group counts) become the slim ones.
    3. A default attention scale becomes a number, so that it does not change with the head size.

    Left alone: groups that a norm runs along, unless `renormalised`; whatever is fixed.

    Attributes:
        ratio: fraction to remove, 0 <= ratio < 1; half if not given.
        of: what the ratio counts: "channels", "parameters", "macs" or "latency".
        importance: the criterion.
        ranking: "uniform", "global", or "auto".
        steps: how many times what is left is scored.
        align: "auto", or keep multiples of this many convolution channels.
        include: globs of groups or parameters to cut.
        exclude: globs of groups or parameters to leave.
        renormalised: also cut channels along which a statistic is taken.
        verify: compare with the original, removed channels silenced.
        seed: for importance "random".
        data: batches to choose or to repair by.
        loss: of the model's output and a batch's target.
        compensate: repair what is left on the data.
        latency_ms: the latency to have, in milliseconds, instead of a ratio.
        provider: where latency is measured.
        threads: threads inside an operator, on the CPU.

    """

    ratio: float | None = None
    of: Unit = "channels"
    importance: Importance = "l2"
    ranking: Ranking = "auto"
    steps: int = 1
    align: Align = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    renormalised: bool = False
    verify: bool = True
    seed: int = 0
    data: Any = None
    loss: Loss | None = None
    compensate: bool | Method = False
    latency_ms: float | None = None
    provider: str = "cpu"
    threads: int = 1

    def rewrite(self, program: Program) -> bool:
        """Replace the graph by a slim one."""
        result = slimmed(program.graph_module, example_inputs=program.inputs, **vars(self))
        program.graph_module = cast(fx.GraphModule, result.model)
        return result.plan.removed > 0
