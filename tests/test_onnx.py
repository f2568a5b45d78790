from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import ExportError, GraphPruneWarning, InvalidRequestError
from graphprune.inference.precision import relative_difference
from graphprune.onnx_export.export import Exported, export
from graphprune.onnx_export.providers import Runtime, open_session
from graphprune.utils.inputs import Inputs, call

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Keyword-only and non-tensor arguments, a dict of outputs that repeats one and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, *, scale: Tensor | None = None, twice: bool = False) -> Any:
        y = self.linear(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))
        y = y if scale is None else y * scale
        return {"linear": y * 2 if twice else y, "parts": [y.sum(1), y], "x": x}


class Viewed(nn.Module):
    """Computes at batch size 2 only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4) + 1


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(
        0
    )  # some weights sum to next to nothing, which makes a relative difference large
    return Net().eval()


@pytest.fixture(scope="module")
def exported(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    inputs = Inputs(X, scale=torch.ones(1, 1), twice=True)
    return export(net, inputs, tmp_path_factory.mktemp("exported") / "net.onnx")


def outputs(exported: Exported, inputs: Inputs) -> list[np.ndarray]:
    found: list[np.ndarray] = open_session(exported.path).run(None, exported.feed(inputs))
    return found


def test_a_file_exported_at_batch_1_computes_what_the_model_does_at_others(
    net: Net, exported: Exported
) -> None:
    assert exported.batch_free
    assert exported.checked == (1, 2)
    for batch in (1, 3, 5):
        inputs = Inputs(torch.randn(batch, 3, 8, 8), scale=torch.rand(batch, 1), twice=True)
        expected = call(net, inputs)["linear"].numpy()
        assert relative_difference(expected, outputs(exported, inputs)[0]) < 1e-5


def test_what_is_reported_is_what_the_file_holds(exported: Exported) -> None:
    model = onnx.load(exported.path)
    assert exported.bytes == exported.path.stat().st_size
    assert exported.opset == model.opset_import[0].version
    assert 0 <= exported.difference < 1e-5


def test_inputs_outputs_and_weights_have_the_names_of_the_model(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    assert exported.inputs == ("x", "scale")
    assert exported.outputs == ("linear", "parts_0", "parts_1", "x_2")
    assert [value.name for value in graph.output] == list(exported.outputs)
    assert {"conv.weight", "linear.weight"} <= {weight.name for weight in graph.initializer}


def test_the_free_dimension_is_called_batch_everywhere(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    dims = [v.type.tensor_type.shape.dim for v in [*graph.input, *graph.output, *graph.value_info]]
    assert {dim.dim_param for value in dims for dim in value} == {"", "batch"}


def test_no_stack_trace_and_no_local_path_is_left_in_the_file(exported: Exported) -> None:
    onnx.checker.check_model(onnx.load(exported.path), full_check=True)
    content = exported.path.read_bytes()
    for trace in (b".py", b"stack_trace", b"forward", str(Path.cwd()).encode()):
        assert trace not in content


def test_the_model_and_its_training_flags_are_left_as_they_were(tmp_path: Path) -> None:
    net = Net()
    net.norm.eval()
    flags = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export(net, X, tmp_path / "net.onnx")
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    net(X)["linear"].sum().backward()


def test_nothing_is_printed_logged_or_warned_about(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(nn.GRU(4, 5, batch_first=True), torch.randn(2, 7, 4), tmp_path / "gru.onnx")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_recurrent_net_with_the_batch_first_has_it_free(tmp_path: Path) -> None:
    lstm = nn.LSTM(4, 5, bidirectional=True, batch_first=True)
    exported = export(lstm, torch.randn(2, 7, 4), tmp_path / "lstm.onnx")
    inputs = Inputs(torch.randn(5, 7, 4))
    expected = call(lstm, inputs)[0].numpy()
    assert exported.batch_free
    assert exported.outputs == ("output_0", "output_1_0", "output_1_1")
    assert relative_difference(expected, outputs(exported, inputs)[0]) < 1e-5
    lstm(torch.randn(2, 7, 4))[0].sum().backward()


def test_a_recurrent_net_with_the_time_first_is_exported_with_a_warning(tmp_path: Path) -> None:
    lstm = nn.LSTM(4, 5)
    with pytest.warns(GraphPruneWarning, match=r"^dimension 0 of input is fixed to 7 in rnn\.onnx"):
        exported = export(lstm, torch.randn(7, 2, 4), tmp_path / "rnn.onnx")
    assert not exported.batch_free
    assert exported.checked == (7,)


def test_a_model_of_one_batch_size_is_checked_at_that_size(tmp_path: Path) -> None:
    with pytest.warns(GraphPruneWarning, match="RuntimeError: shape '\\[2, 4\\]' is invalid"):
        exported = export(Viewed(), torch.randn(2, 4), tmp_path / "viewed.onnx")
    assert exported.checked == (2,)


def test_an_exported_program_keeps_the_dimensions_it_was_given(net: Net, tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    free = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    assert export(free, X, tmp_path / "free.onnx").batch_free
    fixed = torch.export.export(net, (X,))
    with pytest.warns(GraphPruneWarning, match="dimension 0 of x is fixed to 1"):
        assert not export(fixed, X, tmp_path / "fixed.onnx").batch_free


def bert(transformers: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return transformers.BertForSequenceClassification(config), Inputs(ids, attention_mask=mask)


def gpt2(transformers: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}


def llama(transformers: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": ids}


def t5(transformers: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    inputs = {"decoder_input_ids": ids, "input_ids": ids}
    return transformers.T5ForConditionalGeneration(config), inputs


def vit(transformers: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config), torch.randn(1, 3, 16, 16)


def swin(transformers: Any, ids: Tensor) -> tuple[nn.Module, Any]:
    config = transformers.SwinConfig(
        embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4, image_size=32, patch_size=2
    )
    return transformers.SwinForImageClassification(config), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize(
    "build",
    [bert, gpt2, *(pytest.param(b, marks=pytest.mark.full) for b in (llama, t5, vit, swin))],
)
def test_transformers_are_exported_without_their_caches(
    build: Callable[[Any, Tensor], tuple[nn.Module, Any]], tmp_path: Path
) -> None:
    model, inputs = build(pytest.importorskip("transformers"), torch.randint(0, 50, (2, 6)))
    exported = export(model, inputs, tmp_path / "model.onnx")
    assert exported.batch_free
    assert exported.outputs[0] == "logits"
    assert not any("past" in name for name in exported.outputs)


def test_a_file_that_disagrees_is_refused_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        def __init__(self, path: Path) -> None:
            self.session = open_session(path)

        def get_inputs(self) -> Any:
            return self.session.get_inputs()

        def run(self, names: None, feed: Any) -> Any:
            return [array + 0.5 for array in self.session.run(names, feed)]

    before = tmp_path / "relu.onnx"
    before.write_text("before")
    monkeypatch.setattr(
        importlib.import_module("graphprune.onnx_export.export"), "open_session", Wrong
    )
    says = (
        r"^output at batch 2, shape \[2, 3\], differs between PyTorch and ONNX Runtime by 0\.5 of "
        r"its largest value; the tolerance is 0\.0001 for float32, and tolerance= sets another$"
    )
    with pytest.raises(ExportError, match=says):
        export(nn.ReLU(), torch.ones(2, 3), tmp_path / "relu.onnx")
    assert list(tmp_path.iterdir()) == [before]
    assert before.read_text() == "before"


def test_a_model_that_does_not_run_is_refused_with_its_own_words(tmp_path: Path) -> None:
    says = r"cannot be run in PyTorch on Inputs\(float32\[2, 3\]\): RuntimeError: mat1 and mat2"
    with pytest.raises(ExportError, match=says):
        export(nn.Linear(4, 5), torch.randn(2, 3), tmp_path / "linear.onnx")


def test_an_opset_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 99 was asked for"):
        export(nn.ReLU(), torch.randn(2, 3), tmp_path / "relu.onnx", opset=99)
    assert export(nn.ReLU(), torch.randn(2, 3), tmp_path / "relu.onnx", opset=21).opset == 21


def test_a_provider_that_is_not_there_is_refused_by_name(exported: Exported) -> None:
    with pytest.raises(InvalidRequestError, match="no provider 'abacus' here"):
        open_session(exported.path, Runtime.of("abacus"))


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([-np.inf, 2.0], [-np.inf, 1.0], 0.5),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_the_difference_is_relative_to_the_largest_value(
    a: list[float], b: list[float], difference: float
) -> None:
    assert relative_difference(np.array(a), np.array(b)) == difference


@pytest.mark.parametrize(("a", "b"), [(1.0, np.nan), (np.nan, 1.0), (1.0, np.inf)])
def test_a_number_never_agrees_with_what_is_not_one(a: float, b: float) -> None:
    assert not relative_difference(np.array([a]), np.array([b])) <= 1e-4


def test_checks_that_a_model_makes_of_its_values_stay_out_of_the_file(tmp_path: Path) -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            torch._check_tensor_all(x == x, lambda: "not a number")
            return self.layer(x)

    made = export(Checks(), torch.randn(2, 4), tmp_path / "checks.onnx")
    assert made.batch_free
    assert {node.op_type for node in onnx.load(made.path).graph.node} == {"Gemm"}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.cells = kind(6, 8, 2, batch_first=batch_first, bidirectional=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(x)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_length_of_a_sequence_can_be_free(
    kind: type[nn.RNNBase], batch_first: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = gp.slim(Recurrent(kind, batch_first).eval(), 0.5, torch.randn(3, 5, 6))
    free = {"x": {1: "length"} if batch_first else {0: "length", 1: "batch"}}
    for _ in range(2):  # what was exported before makes no difference
        exported = export(model, torch.randn(3, 5, 6), tmp_path / "net.onnx", free=free)
    assert set(exported.free) == {"batch", "length"}
    session = open_session(exported.path)
    names = ["batch", "length"] if batch_first else ["length", "batch"]
    assert session.get_inputs()[0].shape == [*names, 6]
    for shape in ((1, 1, 6), (2, 9, 6), (4, 31, 6)):
        x = torch.randn(*shape)
        (found,) = session.run(None, exported.feed(x))
        torch.testing.assert_close(
            torch.from_numpy(found), call(model, Inputs(x)), rtol=0, atol=1e-5
        )


def test_a_length_that_cannot_be_free_is_fixed_and_the_batch_is_not(tmp_path: Path) -> None:
    model, x = Recurrent(nn.RNN, False).eval(), torch.randn(5, 3, 6)
    free = {"x": {0: "length", 1: "batch"}}
    with pytest.warns(GraphPruneWarning, match=r"^dimension 0 of x is fixed to 5 in net\.onnx"):
        exported = export(model, x, tmp_path / "net.onnx", free=free)
    assert exported.free == ("batch",)
    wider = torch.randn(5, 7, 6)
    (found,) = open_session(exported.path).run(None, exported.feed(wider))
    torch.testing.assert_close(
        torch.from_numpy(found), call(model, Inputs(wider)), rtol=0, atol=1e-5
    )


def test_a_name_that_two_inputs_share_is_one_size(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    a = torch.randn(2, 5)
    names = {"a": {1: "width"}, "b": {1: "width"}}
    exported = export(Pair(), (a, a), tmp_path / "pair.onnx", free=names)
    shapes = [value.shape for value in open_session(exported.path).get_inputs()]
    assert shapes == [["batch", "width"], ["batch", "width"]]
