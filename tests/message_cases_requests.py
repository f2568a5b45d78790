"""What is said of requests, data and losses that do not fit each other; see message_cases.py."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from tests.message_cases import X, case, convolutions, net, said

LABELS = torch.zeros(2, dtype=torch.long)
IMAGES = torch.ones(1, 3, 8, 8)
NONE = torch.nan * X

# ------------------------------------------------------------------------------ what nobody reads


def unread(says: str, **options: Any) -> None:
    said(says, lambda: gp.slim(net(), example_inputs=X, **options))


unread(
    "data will not be read: importance='l2' does not look at data, and no repair is asked for; "
    "compensate=True repairs the weights that stay on it, importance='reconstruction' chooses by it",
    data=[X],
)
unread(
    r"loss will not be read: importance='l2' does not look at a loss \(those that do are taylor, taylor2, "
    r"taylor2_recursion, fisher, obs, oracle\), and a repair needs none",
    data=[X],
    loss=F.cross_entropy,
    compensate=True,
)
unread("seed will not be read: it is for importance='random'", seed=1)
unread(
    "threads will not be read: latency is measured only where latency_ms= or of='latency' ask for it",
    threads=2,
)
unread(
    "ratio and align and include will not be read: plan= says what goes; leave one of both out",
    ratio=0.5,
    plan=gp.Plan({"0.weight:0": [0]}, {"0.weight:0": 8}),
    include=["0*"],
    align=1,
)

# ------------------------------------------------------------------------------------ what is cut

said(
    "ratio=a Tensor is the fraction to remove; it must be a number with 0 <= ratio < 1; the arguments are "
    r"slim\(model, ratio, example_inputs\)",
    lambda: gp.slim(net(), X, 0.5),  # type: ignore[arg-type]
)
said(
    r"asked to remove 90% of channels, and none go: of '0\.weight:0' 4 of 4 stay, the fewest allowed; "
    "align=1 comes nearer",
    lambda: gp.slim(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), 0.9, IMAGES),
)
said(
    r"asked to remove 99\.9% of parameters, but with the fewest channels allowed in each group that may be "
    "cut only 50% can go; align=1 comes nearer",
    lambda: gp.slim(convolutions(4), 0.999, IMAGES, of="parameters"),
)
said(
    "exclude holds a Linear that is no module of the model itself; pass one of model.modules.., not of a "
    r"copy or of another form of it, or its name, as in exclude=\['head'\]",
    lambda: gp.slim(net(), 0.5, X, exclude=[nn.Linear(6, 8)]),
)
said(
    "include holds '1', a ReLU without parameters, so it says of no channels that they should go or stay; "
    "name the layer before or after it",
    lambda: gp.slim(model := net(), 0.5, X, include=[model[1]]),
)


class Residual(nn.Module):
    """A stream that two layers add to, normalised before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x.relu())
        result: Tensor = self.head(self.norm(x))
        return result


said(
    r"exclude='head\*' takes 'first\.weight:0' \(9 tensors, of which head\.weight\) out of what "
    "renormalised=True asks for: channels go from all tensors of a group or from none; leave the pattern "
    r"out to have it cut \(what a model gives keeps its size\)",
    lambda: gp.slim(Residual(), 0.5, X, renormalised=True, exclude=["head*"]),
)


def broken() -> nn.Sequential:
    model = net()
    model[2].weight.data[0, 0] = torch.nan
    return model


said(
    r"the model gives NaN since its weights do: NaN in 2\.weight; load the weights anew, or see what "
    "training did to them",
    lambda: gp.slim(broken(), 0.5, X),
)


def infinite() -> nn.Sequential:
    model = net()
    model[0].weight.data[:2] = torch.inf
    return model


said(
    r"importance='lamp' gives no numbers: NaN or infinite numbers in 0\.weight",
    lambda: gp.slim(infinite(), 0.5, X, importance="lamp"),
)

# --------------------------------------------------------------------------------- data and losses


def scored(says: str, data: Any, loss: Any = F.cross_entropy, importance: str = "taylor") -> None:
    said(says, lambda: gp.slim(net(), 0.5, X, importance=importance, data=data, loss=loss))


scored(
    r"loss=CrossEntropyLoss is a class; pass one of it, as in loss=CrossEntropyLoss\(\)",
    [(X, LABELS)],
    nn.CrossEntropyLoss,
)
scored(
    "loss must be a function of the model's output and the target of a batch that returns one number, not "
    "str",
    [(X, LABELS)],
    "cross_entropy",
)
scored(
    r"the loss gives a tensor of shape \[2\] for batch 0 of data, where one number is needed, in a tensor; "
    r"take its mean over the samples \(reduction='mean' of torch's losses\)",
    [(X, LABELS)],
    nn.CrossEntropyLoss(reduction="none"),
)
scored(
    r"the loss fails on batch 0 of data: TypeError: .*; the batch has no target: pass pairs \(inputs, "
    r"target\)",
    [X],
)
scored(
    "the loss of batch 0 of data does not depend on the output by a derivative: it counts .argmax, a "
    r"comparison\), or it was cut off \(detach, no_grad, item\); pass one that does, as "
    r"F\.cross_entropy is",
    [(X, LABELS)],
    lambda y, t: (y.argmax(1) != t).float().mean(),
)
scored(
    "importance='taylor' scores every channel 0, so that any could go: on this data the loss does not "
    r"change with them \(it is at its least, or it counts\); pass other data or another loss",
    [(X, LABELS)],
    lambda y, t: (0 * y).sum(),
)
scored(
    "batch 1 of data gives NaN in the derivatives of its loss, so all that is summed over the data would "
    r"be none; look at it, or leave it out \(it holds NaN\)",
    [(X, LABELS), (NONE, LABELS)],
)
scored(
    r"batch 1 of data holds no samples, Inputs\(float32\[0, 6\]\); leave it out \(drop_last=True of a "
    r"DataLoader\)",
    [(X, LABELS), (X[:0], LABELS[:0])],
)
scored(
    r"the model does not run on batch 0 of data, Inputs\(float32\[2, 5\]\): RuntimeError: .*; batches need "
    r"the form of example_inputs, \[2, 6\]",
    [(X[:, :5], LABELS)],
)
scored(
    r"batch 0 of data, Inputs\(float32\[6\]\): this importance looks at each sample by itself, so that "
    "inputs and target must have as many along their first dimension, and the loss must take one: "
    "ValueError: .*",
    [(X[0], LABELS[0])],
    importance="fisher",
)
said(
    r"the model does not run on batch 0 of data, Inputs\(float32\[2, 5\]\): RuntimeError: .*",
    lambda: gp.sensitivity(net(), [(X[:, :5], LABELS)], F.cross_entropy),
)
said(
    r"batch 1 of data gives NaN where 0\.weight is fitted, so all that is summed over the data would be "
    r"none; look at it, or leave it out \(it holds NaN\)",
    lambda: gp.slim(net(), 0.5, X, data=[X, NONE], compensate=True),
)
said(
    r"compensate= fits real numbers, and 0\.weight, 1\.weight hold complex ones; leave compensate out",
    lambda: gp.slim(
        nn.Sequential(*[nn.Linear(6, 6, dtype=torch.cfloat) for _ in range(2)]),
        0.5,
        X.to(torch.cfloat),
        data=[X.to(torch.cfloat)],
        compensate=True,
    ),
)


@case(
    r"the repair does more harm than good: the error of the model's output is \d\S* of its square, and "
    r"\d\S* as cut, on the same data; pass more data, batches whose numbers are of one size, or leave "
    "compensate out"
)
def a_repair_that_does_harm(_: Path) -> None:
    repair = importlib.import_module("graphprune.compensation.compensate")._Repair
    repaired = repair.repair_layer

    def spoilt(self: Any, site: Any, *rest: Any) -> Any:
        result = repaired(self, site, *rest)
        self.given.get_parameter(result.weight).mul_(10)
        return result

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(repair, "repair_layer", spoilt)
        gp.slim(net(), 0.5, X, data=[X, X + 1], compensate=True)


# -------------------------------------------------------------------------------------- training


def trained(says: str, make: Callable[[nn.Module, nn.Module], Any]) -> None:
    def run() -> Any:
        model = net()
        return make(gp.slim(model, 0.5, X), model)

    said(says, run)


trained(
    r"finetune trains its first model to give what the second gives, and the first is the larger "
    r"\(0\.weight is \(8, 6\) in it and \(4, 6\) in the second\): they are exchanged; call "
    r"finetune\(slimmer, original, data\)",
    lambda slimmer, model: gp.finetune(copy.deepcopy(model), slimmer, [X]),
)
trained(
    "batch 1 of data in epoch 1 gives nan to minimise, with NaN or infinite numbers in it or in its "
    "gradient, so a step would destroy the slim model: it keeps what the 1 steps before gave it; look at "
    "the batch, or take a lower learning_rate",
    lambda slimmer, model: gp.finetune(slimmer, model, [X, NONE]),
)
