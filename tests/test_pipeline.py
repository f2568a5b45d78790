"""Passes and pipelines."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from graphprune.passes import FoldBatchNorm, RemoveIdentities, SlimChannels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import graphprune as gp
from graphprune.errors import VerificationError
from graphprune.onnx_export.providers import CPU
from graphprune.pipeline.callbacks import Compared, Dumped, Printed, Timed
from graphprune.pipeline.pipeline import Program

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.dropout(self.first(x).mean((2, 3)).view(-1, 16), 0.5, False))


@dataclass(frozen=True)
class RemoveDropout(gp.Pass):
    """Remove dropout, as in docs/pipelines.md."""

    says: bool = True

    def rewrite(self, program: Program) -> bool:
        graph = program.graph_module.graph
        nodes = graph.find_nodes(op="call_function", target=aten.dropout.default)
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        program.graph_module.recompile()
        return bool(nodes) and self.says


@dataclass(frozen=True)
class Optioned(gp.Pass):
    """Does nothing."""

    value: object = 3

    def rewrite(self, program: Program) -> bool:
        return False


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_pass_alone_gives_a_pass_result(model: nn.Module, x: Tensor) -> None:
    graph_module, modified = SlimChannels(ratio=0.5)(model, x)
    assert modified
    assert isinstance(graph_module, fx.GraphModule)
    sizes = [
        n.args[1]
        for n in graph_module.graph.find_nodes(op="call_function", target=aten.view.default)
    ]
    assert sizes == [[-1, 8]]


def test_a_pipeline_runs_passes_in_order_and_tells_of_each(model: nn.Module, x: Tensor) -> None:
    seen: list[tuple[str, bool]] = []
    steps = [RemoveDropout(), SlimChannels(ratio=0.5), RemoveDropout()]
    slim = gp.Pipeline(steps, lambda each, result: seen.append((each.name(), result.modified)))(
        model, x
    )
    assert seen == [("remove-dropout", True), ("slim-channels", True), ("remove-dropout", False)]
    assert not slim.graph.find_nodes(op="call_function", target=aten.dropout.default)
    torch.testing.assert_close(slim(x), gp.slim(model, 0.5, x)(x))


def test_a_pass_fits_torch_fx_pass_managers(model: nn.Module, x: Tensor) -> None:
    traced, _ = gp.Pass.__call__(RemoveDropout(), model, x)
    result = PassManager(passes=[SlimChannels(ratio=0.5)])(traced)
    torch.testing.assert_close(result.graph_module(x), gp.slim(model, 0.5, x)(x))


def test_the_given_graph_is_not_changed(model: nn.Module, x: Tensor) -> None:
    traced, _ = RemoveDropout()(model, x)
    code, width = traced.code, traced.state_dict()["first.weight"].shape
    SlimChannels(ratio=0.5)(traced, x)
    assert traced.code == code
    assert traced.state_dict()["first.weight"].shape == width


def test_a_second_run_of_nothing_changes_nothing(model: nn.Module, x: Tensor) -> None:
    traced, _ = RemoveDropout()(model, x)
    again, modified = SlimChannels(ratio=0)(traced, x)
    assert not modified
    assert again.code == traced.code


@pytest.mark.filterwarnings("ignore:asked to remove 60% of channels")
def test_a_pipeline_as_text_as_python_and_in_a_pass_manager_gives_the_same(
    model: nn.Module, x: Tensor
) -> None:
    text = "remove-dropout, slim-channels{ratio=0.6 importance=l1 include=('first*',)}"
    read = gp.Pipeline.parse(text)
    assert read.text == text
    passes = [RemoveDropout(), SlimChannels(0.6, importance="l1", include=("first*",))]
    assert read.passes == passes
    traced, _ = RemoveDropout()(model, x)
    by_manager = PassManager(passes=passes[1:])(traced).graph_module
    first, second = read(model, x), gp.Pipeline(passes)(model, x)
    assert first.code == second.code == by_manager.code
    states = [each.state_dict() for each in (first, second, by_manager)]
    assert all(torch.equal(states[0][k], state[k]) for state in states for k in states[0])
    assert states[0]["first.weight"].shape[0] == 8


def test_an_exported_program_comes_back_as_one(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    small = gp.Pipeline.parse("remove-identities, slim-channels{ratio=0.5}")(program)
    assert isinstance(small, torch.export.ExportedProgram)
    assert small.state_dict["first.weight"].shape[0] == 8
    wanted = gp.slim(model, 0.5, x)(x[:1])
    torch.testing.assert_close(small.module()(x[:1]), wanted)
    torch.onnx.export(small, f=str(tmp_path / "small.onnx"))
    session = ort.InferenceSession(tmp_path / "small.onnx", providers=[CPU])
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted)


@given(st.lists(values, max_size=3).map(tuple) | values)
def test_options_survive_as_text(value: object) -> None:
    (made,) = gp.Pipeline.parse(gp.Pipeline([Optioned(value)]).text).passes
    assert isinstance(made, Optioned)
    assert made.value == value
    assert type(made.value) is type(value)


@pytest.mark.parametrize("text", ["remove-dropout", " remove-dropout { } ,remove-dropout"])
def test_the_space_in_a_text_says_nothing(text: str) -> None:
    assert [type(each) for each in gp.Pipeline.parse(text).passes] == [RemoveDropout] * text.count(
        "-"
    )


def test_a_pass_that_hides_its_change_is_caught(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(gp.GraphPruneError, match="said that it did not"):
        RemoveDropout(says=False)(model, x)


def test_a_pipeline_has_passes() -> None:
    for wrong in (lambda: gp.Pipeline([]), lambda: gp.Pipeline.parse(" ")):
        with pytest.raises(gp.InvalidRequestError, match=r"name at least one of .*slim-channels"):
            wrong()
    with pytest.raises(gp.InvalidRequestError, match=r"Pipeline\.parse reads a text"):
        gp.Pipeline(["slim-channels"])
    with pytest.raises(gp.InvalidRequestError, match=r"Pipeline\.parse makes a pipeline of one"):
        gp.Pipeline("slim-channels")


def test_callbacks_between_passes_time_print_dump_and_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 9, 9)
    timed, compared = Timed(), Compared(model, x)
    callbacks = [timed, Dumped(tmp_path / "dump"), Printed(), compared]
    passes = [FoldBatchNorm(), RemoveIdentities(), RemoveIdentities()]
    gp.Pipeline(passes, callbacks)(model, x)
    assert [name for name, _ in timed.seconds] == [each.name() for each in passes]
    assert all(seconds > 0 for _, seconds in timed.seconds)
    assert "fold-batch-norm" in str(timed)
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files == ["01-fold-batch-norm.py", "02-remove-identities.py", "03-remove-identities.py"]
    first, last = ((tmp_path / "dump" / name).read_text() for name in (files[0], files[-1]))
    assert "dropout" in first
    assert "dropout" not in last
    assert "batch_norm" not in first
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fold-batch-norm: changed, ")
    assert lines[2].startswith("remove-identities: left as it was, ")
    assert len(compared.differences) == 3
    assert max(compared.differences) < 1e-5


def test_a_pass_that_changes_results_is_caught_between_passes() -> None:
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6)
    pipeline = gp.Pipeline([SlimChannels(ratio=0.5)], Compared(model, x))
    with pytest.raises(VerificationError, match=r"^after slim-channels, output differs"):
        pipeline(model, x)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_graph_pickles_and_moves_with_the_states_that_it_makes(kind: Any) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = kind(8, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.recurrent(x)[0] + torch.full((16,), 0.5)

    x = torch.randn(2, 5, 8)
    graph = gp.Pipeline.parse("remove-identities")(Tagger(), x)
    sink = io.BytesIO()
    torch.save(graph, sink)
    sink.seek(0)
    torch.testing.assert_close(torch.load(sink, weights_only=False)(x), graph(x))
    assert graph.to("meta")(torch.randn(3, 4, 8, device="meta")).shape == (3, 4, 16)
