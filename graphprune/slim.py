"""`slim`: the stages in order, from a model and a ratio to a smaller model that was checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphprune.capture import capture, prepared
from graphprune.choose import Align, Request, Unit, choose
from graphprune.errors import GraphPruneError, VerificationError
from graphprune.groups import DependencyGraph
from graphprune.importance import Importance, scores
from graphprune.inference import infer
from graphprune.inputs import Inputs
from graphprune.literals import rewrite_literals
from graphprune.plan import Plan
from graphprune.shrink import shrunk
from graphprune.state import named_tensors
from graphprune.verify import Verification, verify

Form: TypeAlias = Literal["auto", "module", "graph"]


@dataclass(frozen=True)
class Slimmed:
    """A slim model and how it came about.

    Attributes:
        model: the slim model.
        plan: which channels stayed.
        graph: the dependency graph that the plan is about.
        form: "module" (the model's own class) or "graph" (an fx.GraphModule).
        why_graph: what kept the module form from working, for a graph; else "".
        verification: what was compared, or None where that was not asked for or not possible.
    """

    model: nn.Module
    plan: Plan
    graph: DependencyGraph
    form: str
    why_graph: str
    verification: Verification | None


@dataclass(frozen=True)
class _Job:
    """What is the same for every form that is tried."""

    module: nn.Module
    inputs: Inputs
    request: Request
    importance: Importance
    plan: Plan | None
    seed: int
    check: bool

    def plan_for(self, module: nn.Module, graph: DependencyGraph) -> Plan:
        if self.plan is not None:
            return self.plan
        return choose(graph, scores(module, graph, self.importance, self.seed), self.request)


def _as_module(job: _Job) -> Slimmed:
    graph = DependencyGraph(infer(job.module, job.inputs))
    plan = job.plan_for(job.module, graph)
    masks = plan.masks(graph)
    slimmer = shrunk(job.module, graph.inference, masks)
    seen = None
    if job.check:
        seen = verify(job.module, slimmer, job.inputs, graph.inference, masks)
    return Slimmed(slimmer, plan, graph, "module", "", seen)


def _as_graph(job: _Job, why: str) -> Slimmed:
    module = job.module
    if not isinstance(module, fx.GraphModule):
        module = capture(module, job.inputs).graph_module
    graph = DependencyGraph(infer(module, job.inputs))
    ...
    raise NotImplementedError
