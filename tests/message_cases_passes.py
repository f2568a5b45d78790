"""What is said of plans, passes and pipelines; see message_cases.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import graphprune as gp
from tests.message_cases import X, case, net, said

said(
    r"the plan keeps 1 of 2 channels of group 'fc\.weight:0', but the model has no such group; a plan fits "
    "the model that it was made for",
    lambda: gp.slim(net(), 0.5, X, plan=gp.Plan({"fc.weight:0": [0]}, {"fc.weight:0": 2})),
)
said(
    r"the plan keeps 1 of 2 channels of group '0\.weight:0', but the model has 8 channels; a plan fits the "
    "model that it was made for",
    lambda: gp.slim(net(), 0.5, X, plan=gp.Plan({"0.weight:0": [0]}, {"0.weight:0": 2})),
)


said(
    r"batch 0 of data gives Inputs\(other=float32\[2, 6\]\), 0 arguments where the traced model takes 1; "
    "batches need the form of example_inputs, positional or by name alike; a pair .*",
    lambda: gp.slim(net(), 0.5, X, data=[{"other": X}], compensate=True),
)
LABELLED = [(X, torch.zeros(2, dtype=torch.long))]
said(
    r"importance='taylor2_recursion' does not go back through aten\.softmax.*: it knows layers with "
    "weights of their own, element-wise functions, means and what moves values; use importance='taylor2', "
    "whose second derivatives are exact",
    lambda: gp.slim(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1), nn.Linear(3, 3)),
        0.5,
        X,
        importance="taylor2_recursion",
        data=LABELLED,
        loss=F.cross_entropy,
    ),
)
said(
    r"ratios=\[0\.5, 0\.25\] must rise from above 0 to below 1",
    lambda: gp.sensitivity(net(), LABELLED, F.cross_entropy, ratios=[0.5, 0.25]),
)
said(
    r"the sensitivity scan knows no group '0\.weight:0' of 4 channels; scan the model that is to be cut",
    lambda: gp.slim(
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)),
        0.5,
        X,
        importance=gp.sensitivity(net(), LABELLED, F.cross_entropy),
    ),
)


@case(
    r".*scan\.json is not a cache of sensitivity scans: what it says of sensitivity is None, not an "
    "object; name another file"
)
def a_cache_of_something_else(folder: Path) -> None:
    (folder / "scan.json").write_text("{}")
    gp.sensitivity(net(), LABELLED, F.cross_entropy, cache=folder / "scan.json")


@case(r"plots are drawn by matplotlib, which is not installed: pip install graphprune\[plot\]")
def a_plot_without_matplotlib(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        gp.sensitivity(net(), LABELLED, F.cross_entropy).plot(folder / "scan.svg")


said(
    "distillation=None leaves nothing to learn from; pass loss=",
    lambda: gp.finetune(net(), net(), [X], distillation=None),
)
said(
    "optimiser='adam' must be 'adamw' or 'sgd'",
    lambda: gp.finetune(net(), net(), [X], optimiser="adam"),
)
said(
    "data must be batches with a length, as a list or a DataLoader is, not generator: the learning rate "
    "follows from how many there are",
    lambda: gp.finetune(net(), net(), (x for x in [X])),
)
said("epochs=0 must be a whole number from 1", lambda: gp.finetune(net(), net(), [X], epochs=0))
said(
    "no parameter of the slim model requires a gradient, so none learns",
    lambda: gp.finetune(net().requires_grad_(False), net(), [X]),
)
said(
    "the outputs of the slim model and of the original do not match, tensor by tensor; finetune needs the "
    "model that was cut and what it was cut to",
    lambda: gp.finetune(nn.Linear(6, 2), net(), [X]),
)
said(
    r"no channels of this model can be removed, so there is none to empty; print\(graphprune\.analyze\("
    r"model, inputs\)\) says why for every dimension",
    lambda: gp.GroupLasso(nn.Linear(6, 3), X),
)


@case(r".*plan\.json is not a plan that graphprune saved: format 'other' version 1")
def a_plan_of_another_format(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps({"format": "other", "version": 1}))
    gp.Plan.load(folder / "plan.json")


@case(
    r".*plan\.json is not a plan that graphprune saved: group '0\.weight:0' does not keep sorted slots of "
    "its 8"
)
def a_plan_of_unsorted_slots(folder: Path) -> None:
    gp.Plan({"0.weight:0": [3, 1]}, {"0.weight:0": 8}).save(folder / "plan.json")
    gp.Plan.load(folder / "plan.json")


class Breaks(gp.Pass):
    def rewrite(self, program: Any) -> bool:
        nodes = list(program.graph_module.graph.nodes)
        nodes[-2].append(nodes[0])
        return True

    def __str__(self) -> str:
        return self.name()


class Hides(Breaks):
    def rewrite(self, program: Any) -> bool:
        graph: fx.Graph = program.graph_module.graph
        with graph.inserting_before(graph.output_node()):
            graph.call_function(torch.ops.aten.relu.default, (graph.output_node().args[0][0],))
        return False


said("breaks left a graph that is not well formed: .+", lambda: Breaks()(net(), X))
said("hides changed the graph and said that it did not", lambda: Hides()(net(), X))


@case(
    "there is a pass 'fold-batch-norm' already, .*FoldBatchNorm; give tests.message_cases_passes.a_twin"
    r"\.<locals>\.FoldBatchNorm another name"
)
def a_twin(_: Path) -> Any:
    class FoldBatchNorm(gp.Pass):
        pass

    return FoldBatchNorm
