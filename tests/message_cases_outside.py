"""What is said of ONNX files, timing, sparse connections and on the command line; see message_cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from graphprune.passes import (
    LowerSparseConnections,
    LowerSparseLinear,
    SlimChannels,
    SparseConnections,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import graphprune as gp
from graphprune import cli
from graphprune.inspection.terminal_tree import describe_group
from graphprune.onnx_export import providers
from graphprune.pipeline.callbacks import Compared
from graphprune.report.comparison import Comparison, ModelMeasurement
from graphprune.runtime import timing
from tests.message_cases import Does, X, case, convolutions, net, said

# ------------------------------------------------------------------------------------------- ONNX


@case(
    r"the model cannot be run in PyTorch on Inputs\(float32\[2, 5\]\): RuntimeError: mat1 and mat2 shapes "
    r"cannot be multiplied \(2x5 and 6x8\)"
)
def export_of_a_model_that_does_not_run(folder: Path) -> None:
    gp.export(net(), torch.ones(2, 5), folder / "net.onnx")


@case(r"the model gives no tensors for Inputs\(float32\[2, 6\]\), so nothing to export")
def export_of_nothing(folder: Path) -> None:
    gp.export(Does(lambda module, x: None), X, folder / "net.onnx")


@case(
    r"the model cannot be exported to ONNX: DispatchError: No ONNX function found for .*bessel_j0.*"
)
def export_of_what_onnx_lacks(folder: Path) -> None:
    gp.export(Does(lambda module, x: torch.special.bessel_j0(x)), X, folder / "net.onnx")


@case(
    r"dimension 0 of x is fixed to 2 in net\.onnx, because exporting it free did not work: \w+: .+"
)
def export_of_one_batch_size(folder: Path) -> None:
    gp.export(Does(lambda module, x: module.last(x.view(2, 8))), X, folder / "net.onnx")


@case(r"free= names 'y'; the inputs are input")
def a_free_input_that_there_is_not(folder: Path) -> None:
    gp.export(net(), X, folder / "net.onnx", free={"y": {0: "batch"}})


@case(r"free= names dimension 2 of 'input', which has shape \(2, 6\)")
def a_free_dimension_that_there_is_not(folder: Path) -> None:
    gp.export(net(), X, folder / "net.onnx", free={"input": {2: "length"}})


@case(r"free= calls dimension 1 of 'input' 'size', which is 6 there and 2 elsewhere")
def a_free_dimension_of_two_sizes(folder: Path) -> None:
    gp.export(net(), X, folder / "net.onnx", free={"input": {0: "size", 1: "size"}})


@case(r"opset 3 was asked for, but PyTorch could only write \d+")
def an_old_opset(folder: Path) -> None:
    gp.export(net(), X, folder / "net.onnx", opset=3)


@case(r"ONNX Runtime has no provider 'abacus' here; it has .*cpu.*")
def a_provider_that_is_not_there(folder: Path) -> None:
    providers.Runtime.of("abacus")


@case("'cpu-float16' asks for float16; cpu is timed in float32")
def a_precision_that_a_provider_has_not(folder: Path) -> None:
    providers.Runtime.of("cpu-float16")


@case("threads=0 must be a whole number from 1")
def no_threads(folder: Path) -> None:
    providers.Runtime.of("cpu", 0)


@case("ONNX Runtime cannot start 'AbacusExecutionProvider' here")
def a_provider_that_does_not_start(folder: Path) -> None:
    gp.export(net(), X, folder / "net.onnx")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ort.InferenceSession, "__init__", lambda *_, **__: None)
        monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda _: [providers.CPU])
        providers.open_session(folder / "net.onnx", providers.Runtime("AbacusExecutionProvider"))


class Session:
    """A session of ONNX Runtime whose results are changed."""

    change: Callable[[Any], Any]

    def __init__(self, path: Path) -> None:
        self.session = real_session(path)

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def run(self, names: None, feed: Any) -> Any:
        return [type(self).change(array) for array in self.session.run(names, feed)]


real_session = providers.open_session


def changed(folder: Path, change: Callable[[Any], Any]) -> None:
    kind = type("Changed", (Session,), {"change": staticmethod(change)})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules["graphprune.onnx_export.export"], "open_session", kind)
        gp.export(nn.ReLU(), torch.ones(2, 3), folder / "relu.onnx")


@case(r"output at batch 2 has shape \[2, 3\] in PyTorch and \[3, 2\] in ONNX Runtime")
def another_shape_in_onnx_runtime(folder: Path) -> None:
    changed(folder, np.transpose)


@case(
    r"output at batch 2, shape \[2, 3\], differs between PyTorch and ONNX Runtime by 0\.5 of its largest "
    r"value; the tolerance is 0\.0001 for float32, and tolerance= sets another"
)
def another_result_in_onnx_runtime(folder: Path) -> None:
    changed(folder, lambda array: array + 0.5)


said("latency_ms=-1 must be a number above 0", lambda: gp.slim(net(), 0.5, X, latency_ms=-1))
said(
    "latency_ms= asks for a latency and of='macs' for something else",
    lambda: gp.slim(net(), 0.5, X, latency_ms=1, of="macs"),
)
said(
    r"the slim model takes \d\S* ms on cpu, where 1e-06 ms were asked for and the original takes \d\S* ms: "
    "no more can be cut as asked; renormalised=True or other patterns may free more",
    lambda: gp.slim(net(), 0.5, X, latency_ms=1e-6),
)


@case(
    "nothing that ONNX Runtime runs could be traced back to the model's operators, so its latency cannot "
    "be divided among its channels"
)
def a_profile_of_nothing(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            sys.modules["graphprune.runtime.latency.bench"], "profile_nodes", lambda *_: []
        )
        gp.slim(net(), 0.5, X, of="latency")


@case(r".*report\.txt must end in \.json or \.html")
def a_report_of_another_kind(folder: Path) -> None:
    nothing = ModelMeasurement(0, 0, None, {})
    Comparison(nothing, nothing, "", 1, {}, {}).save(folder / "report.txt")


@case(
    r"after slim-channels, output differs from the original's by \S+ of its largest value; the tolerance "
    "is 0.0001"
)
def a_pass_that_changes_results(folder: Path) -> None:
    gp.Pipeline([SlimChannels(ratio=0.5)], Compared(net(), X))(net(), X)


@case("no feeds for b; each model needs its own")
def no_feed(folder: Path) -> None:
    timing.time_onnx({"b": folder / "b.onnx"}, {})


# ------------------------------------------------------------------------------- the command line

said(r"there is no file missing\.pt", lambda: cli.load_model("missing.pt"))
said("os:getcwd gives a str, not a model", lambda: cli.load_model("os:getcwd"))
said(
    r"'resnet18' names no model; write package\.module:callable, or a file ending in \.pt or \.pt2",
    lambda: cli.load_model("resnet18"),
)
said(
    r"'no\.such:model' does not give a model: No module named 'no'",
    lambda: cli.load_model("no.such:model"),
)
said(
    r"'numbers' names no batches; write package\.module:callable, or a file ending in \.npy",
    lambda: cli.load_batches("numbers"),
)
said(r"there is no file missing\.npy", lambda: cli.load_batches("missing.npy"))
said(r"'builtins:divmod' does not give batches: .+", lambda: cli.load_batches("builtins:divmod"))


@case(r".*\.npy holds no array: .+")
def a_file_that_is_no_array(folder: Path) -> None:
    (folder / "samples.npy").write_bytes(b"nothing of the kind")
    cli.load_batches(str(folder / "samples.npy"))


said(r"--input 'a,b' is not a shape such as 2,3,224,224", lambda: cli.example_inputs(["a,b"]))

# ------------------------------------------------------------------------------- pipelines as text


def pipeline(text: str) -> gp.Pipeline:
    return gp.Pipeline.parse(text)


said(
    r"there is no pass 'slim'; there are .*compensate, .*fold-batch-norm, .*slim-channels.*",
    lambda: pipeline("slim"),
)
said(
    r"the pipeline 'fold-batch-norm slim-channels' should have a comma, options in braces or the end at "
    "'slim-channels'",
    lambda: pipeline("fold-batch-norm slim-channels"),
)
said(
    r"the pipeline 'fold-batch-norm,' should have the name of a pass at the end",
    lambda: pipeline("fold-batch-norm,"),
)
said(
    r"the pipeline 'slim-channels\{0\.5\}' should have an option such as ratio=0\.5, or a closing brace at "
    r"'0\.5\}'",
    lambda: pipeline("slim-channels{0.5}"),
)
said(
    r"the pipeline 'slim-channels\{ratio=0\.5\.1\}' should have a number, a word, a text in quotes or a "
    r"tuple of these at '0\.5\.1\}'",
    lambda: pipeline("slim-channels{ratio=0.5.1}"),
)
said(
    "the pass 'slim-channels' has no option 'rate'; it has ratio, of, .*",
    lambda: pipeline("slim-channels{rate=0.5}"),
)
said("the pass 'compensate' needs original, plan, data", lambda: pipeline("compensate"))
said(
    "the option data of the pass 'slim-channels' is a list, which no text can hold; numbers, texts and "
    "tuples of these can be written",
    lambda: SlimChannels(data=[X]).text,
)

# -------------------------------------------------------------------------------------- optimizers


def carried(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    gp.carry_optimizer(optimizer, model, gp.slimmed(model, 0.5, X))


@case(
    r"the optimizer holds a parameter of shape \(8, 6\) that the model does not; pass the model that it "
    "was made for"
)
def an_optimizer_of_another_model(folder: Path) -> None:
    carried(torch.optim.SGD(net().parameters()), net())


@case(r"the optimizer holds a parameter of shape \(2,\) 'spare' that the slim model lacks")
def an_optimizer_of_a_parameter_that_went(folder: Path) -> None:
    model = net()
    result = gp.slimmed(model, 0.5, X)
    model.spare = nn.Parameter(torch.ones(2))
    gp.carry_optimizer(torch.optim.SGD(model.parameters()), model, result)


@case(
    r"Adafactor keeps 'row_var' of shape \(8, 1\) for '\w+\.weight', which has \(8, 6\), and what to leave "
    "out of it is not known; make a new optimizer"
)
def an_optimizer_that_keeps_other_shapes(folder: Path) -> None:
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    carried(optimizer, model)


# ------------------------------------------------------------------------------------- saved models


def saved(folder: Path) -> Path:
    gp.save(gp.slimmed(net(), 0.5, X), folder / "slim.safetensors")
    return folder / "slim.safetensors"


def with_header(folder: Path, **changed: str) -> Path:
    path = saved(folder)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, header | changed)
    return path


@case(r".*slim\.safetensors cannot be read as safetensors: .+")
def a_truncated_model(folder: Path) -> None:
    path = saved(folder)
    path.write_bytes(path.read_bytes()[:-10])
    gp.load(path, net(), X)


@case(r".*missing\.safetensors cannot be read as safetensors: .+")
def a_model_that_is_not_there(folder: Path) -> None:
    gp.load(folder / "missing.safetensors", net(), X)


@case(
    r".*slim\.safetensors is no slim model that this version of graphprune\.save wrote: its header says "
    r"format 'graphprune-model', version '0'"
)
def a_model_of_another_version(folder: Path) -> None:
    gp.load(with_header(folder, version="0"), net(), X)


@case(r"the plan in .*slim\.safetensors cannot be read: .+")
def a_model_with_a_broken_plan(folder: Path) -> None:
    gp.load(with_header(folder, plan="{}"), net(), X)


@case(
    r".*slim\.safetensors and the model differ in spare; a file is for the model that it was made from"
)
def a_file_for_another_model(folder: Path) -> None:
    model = net()
    model.spare = nn.Parameter(torch.ones(2))
    gp.load(saved(folder), model, X)


@case(
    r"2\.bias has shape \(3,\) in .*slim\.safetensors, and \(5,\) in the model without what the plan "
    "removes"
)
def a_file_for_a_model_of_other_sizes(folder: Path) -> None:
    gp.load(saved(folder), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), X)


@case("Sequential has no config and no save_pretrained of transformers; use graphprune.save")
def a_model_without_a_config(folder: Path) -> None:
    gp.save_pretrained(gp.slimmed(net(), 0.5, X), folder)


# ------------------------------------------------------------------------- sparse connections

IMAGE = torch.ones(1, 3, 6, 6)


for fraction in (0, -0.5, 1.5):
    said(
        rf"fraction={fraction} of the connections must be above 0 and at most 1; it is what stays",
        lambda fraction=fraction: gp.connect_sparsely(convolutions(), fraction, IMAGE),
    )
said(
    "pattern='best' is none of random, expander, magnitude, taylor",
    lambda: SparseConnections(pattern="best")(convolutions(), IMAGE),
)
said(
    "share=0 must be a number of filters, 1 or more",
    lambda: gp.connect_sparsely(convolutions(), 0.5, IMAGE, share=0),
)
said(
    "pattern='taylor' asks what the loss does; pass loss=, a function of output and target",
    lambda: gp.connect_sparsely(convolutions(), 0.5, IMAGE, pattern="taylor", data=[IMAGE]),
)
said(
    "none of the model's 2 convolutions has connections to spare, so it stays as it was: they must "
    "be ungrouped, not transposed, read and make 8 channels or more, and have a weight that nothing else "
    "reads",
    lambda: gp.connect_sparsely(convolutions(groups=2), 0.5, IMAGE),
)
said(
    r"sparse convolutions that run no faster on cpu stay dense: 2\.weight \(16 blocks of 1\); filters "
    "have to share their channels with enough others, as with share=32",
    lambda: gp.Pipeline([SparseConnections(share=1), LowerSparseConnections()])(
        convolutions(), IMAGE
    ),
)


@case(
    "the zeros of linear layers stand alone, in no blocks of several rows, so they gain no time: weight; "
    r"export\(..., sparse_weights=True\) makes the file smaller, and blocks, as of SparseRecurrent or "
    r"GradualSparsity\(block=\(32, 32\), balanced=True\), the time"
)
def zeros_in_no_blocks(folder: Path) -> None:
    model = nn.Linear(64, 64)
    model.weight.data *= torch.rand(64, 64) < 0.2
    LowerSparseLinear()(model, torch.zeros(1, 64))


said(
    "start=0.5, end=0.25, factor=2.0 and every=5 must let the connections grow: start no larger than end, "
    "factor above 1, every 1 or more",
    lambda: gp.IncrementalConnections(convolutions(), IMAGE, every=5, start=0.5, end=0.25),
)
said(
    "new_weights='random' is neither 'initial' nor 'zero'",
    lambda: gp.IncrementalConnections(convolutions(), IMAGE, every=5, new_weights="random"),
)
said(
    "Sequential has no sparse connections to exchange; make it by graphprune.connect_sparsely",
    lambda: gp.DropAndGrow(convolutions(), until=100),
)
said(
    "fraction=1 must be above 0 and below 1, every=100 and until=100 numbers of steps",
    lambda: gp.DropAndGrow(gp.connect_sparsely(convolutions(), 0.5, IMAGE), until=100, fraction=1),
)
said(
    "multiplier=2 must be above 0 and at most 1; it is what stays of the channels",
    lambda: gp.width_multiplier(convolutions(), 2, IMAGE),
)


@case(
    r"Sequential, 0 hold parameters and have no reset_parameters\(\) that gives fresh ones; write one, as "
    r"torch\.nn's layers have"
)
def a_narrower_network_that_cannot_start_anew(folder: Path) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    model = nn.Sequential(Scale(), nn.Linear(6, 8), nn.Linear(8, 3))
    model.extra = nn.Parameter(torch.ones(2))
    gp.width_multiplier(model, 0.5, X)


# ---------------------------------------------------------------------------- gradual sparsity

said(
    "start=5, ramp=3, end=9 and every=100 must be steps with 0 <= start < ramp <= end and every from 1",
    lambda: gp.GradualSparsity(net(), start=5, ramp=3, end=9),
)
said(
    "start=1, ramp=5, end=9 and every=0 must be steps with 0 <= start < ramp <= end and every from 1",
    lambda: gp.GradualSparsity(net(), start=1, end=9, every=0),
)
said(
    "schedule='linear' must be 'threshold', 'cubic' or 'hard'",
    lambda: gp.GradualSparsity(net(), start=1, end=9, schedule="linear"),
)
said(
    r"sparsity=1\.5 and most=0\.99 must be between 0 and 1, slope_ratio=1\.5 above 0, and block=\(1, 1\) "
    "rows and columns, 1 or more",
    lambda: gp.GradualSparsity(net(), start=1, end=9, sparsity=1.5),
)
said(
    r"Conv2d has no weight of a recurrent or linear layer to prune that include=\('\*',\) and exclude=\(\) "
    "choose",
    lambda: gp.GradualSparsity(nn.Conv2d(3, 3, 1), start=1, end=9),
)
said(
    r"the reference has no 0\.weight, 2\.weight, whose size the threshold would follow; it must be a model "
    "of the same names",
    lambda: gp.GradualSparsity(net(), start=1, end=9, reference=nn.Linear(2, 2)),
)


@case(
    "nine tenths of the linear weights of the reference are zero, so they say no threshold; pass "
    "reference=, a dense model"
)
def a_threshold_of_zeros(folder: Path) -> None:
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    gp.GradualSparsity(model, start=1, end=9)


@case(
    r"the state is of other weights or blocks: it has \{'weight': \(1, 8, 8\)\}, and this schedule "
    r"\{'weight': \(1, 4, 4\)\}"
)
def a_state_of_other_blocks(folder: Path) -> None:
    model = nn.Linear(8, 8)
    state = gp.GradualSparsity(model, start=1, end=9).state_dict()
    gp.GradualSparsity(model, start=1, end=9, block=(2, 2)).load_state_dict(state)


# -------------------------------------------------------------------------------------- pictures

said(
    r"net\.docx must end in \.html, \.json, \.graphml, \.svg or \.png",
    lambda: gp.analyze(net(), X).save("net.docx"),
)
said(
    "there is no group 'stem'; they are 0.weight:0, or their numbers from 0 to 0",
    lambda: describe_group(gp.analyze(net(), X), "stem"),
)
said(
    r"report\.pdf must end in \.html",
    lambda: gp.slimmed(net(), 0.5, X, align=1).report("report.pdf"),
)
