"""What users do that gets an error or a warning, and all that is said then, word for word."""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, library, nn

import graphprune as gp


@dataclass(frozen=True)
class Case:
    """Something that a user does, and a pattern of all that is said then."""

    name: str
    says: str
    run: Callable[[Path], Any]


CASES: list[Case] = []


def case(says: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    def add(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES.append(Case(function.__name__, says, function))
        return function

    return add


def said(says: str, function: Callable[[], Any]) -> None:
    name = f"{len(CASES)}"
    CASES.append(Case(name, says, lambda _: function()))


X = torch.ones(2, 6)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def convolutions(last: int = 16, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, last, 3, **options))


def only_one() -> nn.Linear:
    """Return a layer that reads the first of two units."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    return layer


class Does(nn.Module):
    """A hidden layer, a function of it, a last layer."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(6, width), nn.Linear(width, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.hidden(x))


# ------------------------------------------------------------------------------ what is asked for

said(
    r"ratio=1\.5 is the fraction to remove; it must be a number with 0 <= ratio < 1",
    lambda: gp.slim(net(), 1.5, X),
)
said(
    "of='bytes' must be 'channels', 'parameters', 'macs' or 'latency'",
    lambda: gp.slim(net(), 0.5, X, of="bytes"),
)
said(
    "ranking='best' must be 'auto', 'uniform' or 'global'",
    lambda: gp.slim(net(), 0.5, X, ranking="best"),
)
said("steps=0 must be a whole number from 1", lambda: gp.slim(net(), 0.5, X, steps=0))
said("align=0 must be 'auto' or a whole number from 1", lambda: gp.slim(net(), 0.5, X, align=0))
said(
    r"exclude must be a list of patterns or modules, as in exclude=\['head\*'\], not '0\.\*'",
    lambda: gp.slim(net(), 0.5, X, exclude="0.*"),
)
said(
    r"the pattern 'fc\*' fits no parameter, module or group of the model; names are like 0\.weight, "
    r"0\.bias, 2\.weight, 2\.bias, 0\.weight:0",
    lambda: gp.slim(net(), 0.5, X, include=["fc*"]),
)
said("form='onnx' must be 'auto', 'module' or 'graph'", lambda: gp.slim(net(), 0.5, X, form="onnx"))
said(
    "importance='luck' is not a criterion; choose from random, l1, l2, lamp, bn_scale, taylor, taylor2, "
    "taylor2_recursion, fisher, obs, oracle, reconstruction, interpolative",
    lambda: gp.slim(net(), 0.5, X, importance="luck"),
)
said(
    r"the importance function must give 8 numbers for group '0\.weight:0', not an array of shape \(3,\)",
    lambda: gp.slim(net(), 0.5, X, importance=lambda model, graph: {"0.weight:0": np.ones(3)}),
)
said(
    r"0\.weight is on the meta device and has no values to score; use importance='random' or a function, "
    "say by weights= which files hold them, or load the weights first",
    lambda: gp.slim(net().to("meta"), 0.5, X),
)
said(
    r"this importance looks at data; pass data=\[\.\.\.\], a list of batches or a DataLoader",
    lambda: gp.slim(net(), 0.5, X, importance="taylor", loss=nn.functional.mse_loss),
)
said(
    "this importance looks at a loss; pass loss=, a function of the model's output and the target of a "
    "batch that returns one number",
    lambda: gp.slim(net(), 0.5, X, importance="taylor", data=[(X, X[:, :3])]),
)
said(
    "importance='oracle' gives no numbers on this data: the loss or its derivatives are not finite",
    lambda: gp.slim(
        nn.Sequential(nn.Linear(6, 2, bias=False), only_one()),
        0.5,
        X,
        importance="oracle",
        data=[X],
        loss=lambda y, _: (y / y).sum(),
    ),
)
said(
    r"data must be several batches, as in \[batch\] or a DataLoader, not Tensor",
    lambda: gp.slim(net(), 0.5, X, data=X, compensate=True),
)
said(
    r"data holds no batch; pass at least one, as in data=\[images\]",
    lambda: gp.slim(net(), 0.5, X, data=[], compensate=True),
)
said(
    r"batch 1 of data must be the model's input \(a tensor, a dict or graphprune\.Inputs\) or a pair of it "
    r"and a target, not list of 3 \(Tensor, Tensor, Tensor\); several inputs are "
    r"graphprune\.Inputs\(a, b\), with a target \(graphprune\.Inputs\(a, b\), target\)",
    lambda: gp.slim(net(), 0.5, X, data=[X, [X, X, X]], compensate=True),
)
said(
    "compensate='magic' must be True, False, 'least_squares' or 'constants'",
    lambda: gp.slim(net(), 0.5, X, compensate="magic"),
)
said(
    r"compensate= repairs on data; pass data=\[\.\.\.\], a list of batches or a DataLoader",
    lambda: gp.slim(net(), 0.5, X, compensate=True),
)
said(
    "nothing is repaired: no convolution, linear or recurrent layer of this model reads weights of its own",
    lambda: gp.slim(nn.LSTM(6, 8, proj_size=3), 0.5, X[None], data=[X[None]], compensate=True),
)
said(
    "compensate= needs weights, and this model is on the meta device; load them first",
    lambda: gp.slim(net().to("meta"), 0.5, X, importance="random", data=[X], compensate=True),
)
said(
    r"the model does not run on batch 0 of data, Inputs\(float32\[2, 5\]\): RuntimeError: .*; batches need "
    "the form of example_inputs, and their sizes where tracing left none free",
    lambda: gp.slim(net(), 0.5, X, data=[X[:, :5]], compensate=True),
)
said(
    r"aten\.add has a rule already; each operator takes one",
    lambda: gp.rule(torch.ops.aten.add)(lambda call: []),
)
said(
    r"the model has no parameter or buffer '0\.wait'; the nearest names are 0\.weight, 2\.weight, 0\.bias",
    lambda: gp.analyze(net(), X).explain("0.wait", 0),
)
said(
    r"there is no dimension 2 of '0\.weight', which has 2",
    lambda: gp.analyze(net(), X).explain("0.weight", 2),
)

# ------------------------------------------------------------------------------ models and inputs

said(
    "example_inputs must be a tensor, a tuple of positional arguments, a dict of keyword arguments or "
    r"graphprune\.Inputs\(\.\.\.\), not int",
    lambda: gp.slim(net(), 0.5, 3),
)
said(
    r"the model must be an nn\.Module, an fx\.GraphModule or a torch\.export\.ExportedProgram, not str",
    lambda: gp.slim("resnet18", 0.5, X),
)
said(
    "the model is a TorchScript module, which has no Python code to trace; pass the nn.Module that it was "
    "made from",
    lambda: gp.slim(torch.jit.trace(net(), X), 0.5, X),
)
said("ReLU holds no parameters, so there is nothing to cut", lambda: gp.slim(nn.ReLU(), 0.5, X))
said(
    r"0\.bias, 0\.weight have no shape yet; run the model once on an example input first",
    lambda: gp.slim(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), 0.5, X),
)
said(
    r"Does needs example_inputs: none of Inputs\(float32\[2, 6\]\), Inputs\(float32\[2, 16, 6\]\) fits",
    lambda: gp.slim(Does(lambda module, x: x.view(7, 7)), 0.5),
)
said(
    "Bilinear needs example_inputs: its first layer does not tell what they are",
    lambda: gp.slim(nn.Bilinear(3, 4, 5), 0.5),
)
said(
    r"Sequential does not run on Inputs\(float32\[2, 5\]\): RuntimeError: .*mat1 and mat2.*\n"
    r"Pass example_inputs that the model accepts\.",
    lambda: gp.slim(net(), 0.5, torch.ones(2, 5)),
)
said(
    r"Sequential does not run on Inputs\(float32\[2, 5\]\): RuntimeError: .*\n"
    r"Pass example_inputs that the model accepts\.",
    lambda: gp.analyze(net().to("meta"), torch.ones(2, 5)),
)
said(
    r"Does returns no tensors that can be found; let it return tensors, or tuples, lists, dicts or "
    "dataclasses of them",
    lambda: gp.slim(Does(lambda module, x: "done"), 0.5, X),
)


@case(
    r"Does does not run on Inputs\(float32\[2, 6\]\): _LinAlgError: linalg\.cholesky: .*\n"
    r"Pass example_inputs that the model accepts\."
)
def values_on_which_it_fails(_: Path) -> None:
    def function(module: Any, x: Tensor) -> Tensor:
        return module.last(x) + torch.linalg.cholesky(-torch.eye(3) - x[:1, :1] ** 2)[:1]

    gp.slim(Does(function), 0.5, X)


@case(
    "Does cannot be copied by copy.deepcopy, and graphprune never changes the model it was given: cannot "
    r"pickle '_thread\.lock' object"
)
def a_model_that_cannot_be_copied(_: Path) -> None:
    model = Does(lambda module, x: module.last(x))
    model.lock = threading.Lock()  # type: ignore[assignment]
    gp.slim(model, 0.5, X)


def by_values(module: Any, x: Tensor) -> Tensor:
    return module.last(x.relu() if x.sum().item() > 1e9 else x.sigmoid())


said(
    r"Does cannot be traced by torch\.export: \w+: [^\n]+\n(  .+: \w+: .+\n)+"
    "The graph form was needed because: asked for",
    lambda: gp.slim(Does(by_values), 0.5, X, form="graph"),
)
said(
    r"2\.hidden\.weight:0 stay whole: the model's code may hold their sizes as numbers, which cannot be "
    r"rewritten, since torch\.export cannot trace it",
    lambda: gp.slim(
        nn.Sequential(net(), nn.Linear(3, 6), Does(lambda m, x: by_values(m, x.view(-1, 8)))),
        0.5,
        X,
    ),
)


@case(
    r"Does cannot be traced by torch\.export: \w+: [^\n]+\n"
    r"  all sizes free: NotImplementedError: a size that takes over 40 operations\n.*"
)
def sizes_that_get_entangled(_: Path) -> None:
    def function(module: Any, x: Tensor) -> Tensor:
        rows = x
        for width in (3, 5, 7, 11):
            rows = nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % width))
            rows = rows.view(width, -1, rows.shape[1])[1:].flatten(0, 1)
        return by_values(module, rows)

    gp.slim(Does(function), 0.5, torch.ones(30, 6), form="graph")


# ----------------------------------------------------------------------------------- what is done

said(
    r"no channels of this model can be removed, so it is returned as it was; print\(graphprune\.analyze"
    r"\(model, inputs\)\) says why for every dimension",
    lambda: gp.slim(nn.Linear(6, 3), 0.5, X),
)
said(
    r"no group of this model may be cut as asked \(of 1, 1 excluded\), so it is returned as it was",
    lambda: gp.slim(net(), 0.5, X, exclude=["0.weight"]),
)
said(
    r"no group of this model may be cut as asked \(of 1, 1 renormalised \(allow with renormalised=True\)\),"
    " so it is returned as it was",
    lambda: gp.slim(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), 0.5, X),
)
said(
    r"aten\.native_layer_norm takes a statistic over channels that are cut, now over fewer of them, so the "
    r"slim model differs from the silenced original; groups: 0\.weight:0",
    lambda: gp.slim(
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), 0.5, X, renormalised=True
    ),
)
said(
    r"asked to remove 95% of parameters, but with the fewest channels allowed in each group that may be "
    r"cut only 84% can go",
    lambda: gp.slim(net(), 0.95, X, of="parameters"),
)
said(
    r"asked to remove 10% of channels, and none go: of '0\.weight:0' 16 of 16 stay, the allowed number "
    r"nearest to 14\.4; align=1 comes nearer",
    lambda: gp.slim(convolutions(4), 0.1, torch.ones(1, 3, 8, 8)),
)
said(
    r"asked to remove 30% of parameters, and 49\.8% go, since the numbers of channels allowed are no finer "
    r"\(the next step, 8 more of '0\.weight:0', leaves too many\); align=1 comes nearer",
    lambda: gp.slim(convolutions(4), 0.3, torch.ones(1, 3, 8, 8), of="parameters"),
)


@case(
    r"the example inputs reach no operator that reads spare\.weight, spare\.bias: they keep their sizes "
    "and may no longer fit where they are used; pass example_inputs that reach them if you need them"
)
def parameters_that_nothing_reads(_: Path) -> None:
    model = Does(lambda module, x: module.last(x))
    model.spare = nn.Linear(8, 3)
    gp.slim(model, 0.5, X)


# -------------------------------------------------------------------------------- what is checked

said(
    r"Does gives no finite number on the example inputs, so there is nothing to compare; pass other "
    "example_inputs, or verify=False to leave the result unchecked",
    lambda: gp.slim(Does(lambda module, x: module.last(x) * float("nan")), 0.5, X),
)
said(
    r"the slim model does not run: RuntimeError: shape '\[-1, 8\]' is invalid for input of size \d+",
    lambda: gp.slim(Does(lambda module, x: module.last(x.view(-1, 8))), 0.35, X, form="module"),
)


def wide_output(module: Any, x: Tensor) -> Any:
    return module.last(x), x.new_ones(2, module.hidden.out_features)


for check in (True, False):
    said(
        r"output\[1\] of the slim model has shape \[2, 4\], not \[2, 8\]",
        lambda check=check: gp.slim(Does(wide_output), 0.5, X, form="module", verify=check),
    )


def another_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shrinking keep other channels of the last layer than of the hidden one."""
    shrink = importlib.import_module("graphprune.shrink.tensors")
    right = shrink.slice_tensor

    def wrong(tensor: Tensor, layouts: Any, masks: Any) -> Tensor | None:
        found = right(tensor, layouts, masks)
        return found.flip(1) if found is not None and tensor.shape == (3, 8) else found

    monkeypatch.setattr(shrink, "slice_tensor", wrong)


@case(
    r"output of the slim model differs by [\d.e-]+ from the original with the removed channels silenced, "
    r"whose largest value is [\d.e-]+"
)
def another_result(_: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        another_slice(monkeypatch)
        gp.slim(Does(lambda module, x: module.last(x)), 0.5, torch.randn(2, 6), form="module")


@case(r"output\[0\] of the slim model differs in \d+ of 64 entries")
def another_number(_: Path) -> None:
    def function(module: Any, x: Tensor) -> Any:
        return module.last(x).argmax(1), x.new_ones(1)

    with pytest.MonkeyPatch.context() as monkeypatch:
        another_slice(monkeypatch)
        torch.manual_seed(0)
        gp.slim(Does(function), 0.5, torch.randn(64, 6), form="module")


@case(
    r"the model ran other operators than when it was analysed: step \d is aten\.\w+\.default, where the "
    r"analysis saw aten\.\w+\.default; its control flow depends on values, so pass example_inputs that "
    "take the usual path"
)
def another_way_each_time(_: Path) -> None:
    ways = iter([torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.sin, torch.cos, torch.erf,
                 torch.abs, torch.neg, torch.atan, torch.sinh, torch.square])  # fmt: skip
    gp.slim(Does(lambda module, x: module.last(next(ways)(x))), 0.5, X, form="module")


@case(
    r"the model ran other operators than when it was analysed: step \d+ is the end, where the analysis saw "
    r"aten\.sin\.default; its control flow depends on values, so pass example_inputs that take the usual "
    "path"
)
def a_shorter_way_each_time(_: Path) -> None:
    lengths = itertools.count(9, -1)

    def function(module: Any, x: Tensor) -> Tensor:
        y = module.last(x)
        for _ in range(next(lengths)):
            y = y.sin()
        return y

    gp.slim(Does(function), 0.5, X, form="module")


@case(
    r"an in-place statistic along a cut axis \(messages\.centre_, message_cases\.py:\d+\): give its rule "
    "to an operator that returns the result instead"
)
def a_statistic_in_place(_: Path) -> None:
    with library._scoped_library("messages", "FRAGMENT") as definitions:
        definitions.define("centre_(Tensor(a!) x) -> Tensor(a!)")
        definitions.impl(
            "centre_", lambda x: x.sub_(x.mean(-1, keepdim=True)), "CompositeExplicitAutograd"
        )
        operator = torch.ops.messages.centre_

        def centred(call: Any) -> Any:
            call.renormalise(call.layouts("x")[1], "a mean")
            return [call.layouts("x")]

        gp.rule(operator)(centred)
        try:
            model = Does(lambda module, x: module.last(operator(x)))
            gp.slim(model, 0.5, X, renormalised=True, form="module")
        finally:
            importlib.import_module("graphprune.rules").unregister(operator)


class Routed(nn.Module):
    """Two experts, the first for rows whose last hidden unit is on; it runs only if there are such."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.gate = nn.Linear(6, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(net() for _ in range(2))
        self.entries = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        with torch.no_grad():
            self.hidden.weight[7] = torch.eye(6)[0]
            self.hidden.bias[7] = 0
            self.gate.weight.copy_(torch.eye(8)[[7, 6]] * torch.tensor([[5.0], [0.0]]))
            self.gate.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x).relu()
        chosen = self.gate(hidden).argmax(-1)
        result = x.new_zeros(len(x), 3)
        for number in chosen.unique().tolist():
            rows = torch.where(chosen == number)[0]
            result = result.index_add(
                0, rows, self.experts[number](self.entries[number](hidden[rows]))
            )
        return result


ROUTED = torch.eye(6)[:2]


@case(
    r"experts\.0\.0\.weight:0 are cut but not compared: with the values of the example inputs the model "
    r"does not use them \(experts that no token goes to, say\); pass example_inputs that do"
)
def an_expert_that_is_not_used_once_silenced(folder: Path) -> None:
    kept = {"hidden.weight:0": list(range(7)), "experts.0.0.weight:0": [0, 1, 2, 3]}
    sizes = {"hidden.weight:0": 8, "experts.0.0.weight:0": 8}
    gp.slim(Routed(), example_inputs=ROUTED, plan=gp.Plan(kept, sizes, {}), form="module")
