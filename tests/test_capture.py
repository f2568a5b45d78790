from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.capture import capture
from graphprune.errors import GraphPruneWarning


class Language(nn.Module):
    """A transformer that is given a mask, whose values torch looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(15, 16), nn.Linear(16, 15)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.last(self.body(self.embedding(x), mask=mask))


class Padded(Language):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(self.embedding(x), src_key_padding_mask=x == 0)
        return self.last(hidden.mean(1))


class Gated(nn.Module):
    """Attention of torch's own, in code that asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if x.abs().max() > 1e4:
            x = x.clamp(-1e4, 1e4)
        return self.last(torch.relu(self.first(x)))


def tokens() -> Tensor:
    return torch.randint(1, 15, (2, 9), generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_a_transformer_that_is_given_a_mask_is_cut_and_exported_with_a_free_batch(
    tmp_path: Path,
) -> None:
    slim = gp.slimmed(Language().eval(), 0.5, tokens(), align=1)
    assert slim.plan.removed
    assert slim.verification is not None
    assert gp.export(slim.model, tokens(), tmp_path / "net.onnx").batch_free


def test_where_nothing_can_be_traced_the_heads_of_torchs_attention_stay_and_the_rest_is_cut() -> (
    None
):
    model = Gated().eval()
    with pytest.warns(GraphPruneWarning, match=r"^attention\.in_proj_weight:0\.0 stay whole"):
        slim = gp.slimmed(model, 0.5, torch.randn(2, 7, 16), align=1)
    assert slim.form == "module"
    assert slim.model.first.out_features == 16  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:asked to remove 0%")
def test_a_graph_that_differs_from_the_fast_path_of_torch_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), tokens()
    x[1, 4:] = 0
    with pytest.warns(GraphPruneWarning, match="the graph gives what body gives in training"):
        gp.slim(model, 1e-9, x, form="graph")
    with pytest.warns(GraphPruneWarning, match=r"net\.onnx gives what body gives in training"):
        exported = gp.export(model, x, tmp_path / "net.onnx")
    assert exported.difference < 1e-5


def test_four_threads_trace_and_export_at_once(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            x = torch.randn(3, 8)
            graph = gp.slim(mlp(), 0.5, x, form="graph")
            gp.export(graph, x, tmp_path / f"{number}.onnx")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_sizes_that_take_long_are_not_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(capture, "_SECONDS_AN_OPERATOR", 0.0)
    graph = capture.capture(mlp(), gp.Inputs(torch.randn(3, 8)))
    assert graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape == (3, 8)


def test_a_model_that_cannot_be_traced_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class ByValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y[: int(y.abs().max() > 0) + 1] if y[y > 0].sum() > 0 else y

    with pytest.raises(gp.CaptureError, match=r"cannot be traced by torch\.export: "):
        gp.slim(ByValues().eval(), 0.5, torch.randn(2, 8), form="graph")
    assert capfd.readouterr() == ("", "")
