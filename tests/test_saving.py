"""Slim models go through a file and come back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.utils.inputs import call, output_tensors
from tests.models import build, example


@pytest.mark.filterwarnings("ignore:the config of the slim")
@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", ["crnn", "bert", "llama"])
def test_a_slim_model_comes_back_from_its_file(name: str, form: str, tmp_path: Path) -> None:
    inputs = example(name).inputs
    result = gp.slimmed(build(name), 0.5, inputs, form=form, of="parameters")
    with torch.no_grad():
        for parameter in result.model.parameters():  # as training would
            parameter += 0.01
    gp.save(result, tmp_path / "slim.safetensors")
    fresh = build(name)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = gp.load(tmp_path / "slim.safetensors", fresh, inputs)
    assert type(loaded).__name__ == type(result.model).__name__
    given = gp.Inputs.of(inputs)
    wanted, found = (list(output_tensors(call(m.eval(), given))) for m in (result.model, loaded))
    for (_, a), (_, b) in zip(wanted, found, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["slim.safetensors"]


def test_ties_stay_ties(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.hidden(self.embedding(tokens)).relu())

    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(6).view(2, 3)
    result = gp.slimmed(model, 0.5, tokens)
    gp.save(result, tmp_path / "slim.safetensors")
    loaded = gp.load(tmp_path / "slim.safetensors", Tied(), tokens)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded(tokens), result.model(tokens))


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = gp.slimmed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 0.5)
    path = tmp_path / "slim.safetensors"
    gp.save(result, path)
    content = path.read_bytes()

    def fails(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("graphprune.checkpoint.save.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        gp.save(result, path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
