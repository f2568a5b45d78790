from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.report.compare import compare
from graphprune.report.comparison import Comparison, NodeTime, page

X = torch.randn(2, 16)


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


class Refused(nn.Module):
    """A model that PyTorch runs and cannot export."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def comparison(kept: Path) -> Comparison:
    return compare(net(32), net(8), X, seconds=0.1, path=kept)


def test_sizes_are_counted_for_both_models(comparison: Comparison) -> None:
    assert comparison.original.parameters == 16 * 32 + 32 + 32 * 4 + 4
    assert comparison.slim.parameters == 16 * 8 + 8 + 8 * 4 + 4
    assert comparison.original.macs > comparison.slim.macs > 0


def test_the_memory_of_running_it_is_measured(comparison: Comparison) -> None:
    sides = comparison.original.file, comparison.slim.file
    if sys.platform == "linux":
        assert all(side is not None and side.memory and side.memory > 0 for side in sides)


def test_where_the_time_goes_is_told_by_module(comparison: Comparison) -> None:
    for side in (comparison.original, comparison.slim):
        assert [place.module for place in side.places if place.seconds] == ["1", "2"]
        assert len({place.node for place in side.places}) == len(side.places)


def test_other_batches_and_torch_are_timed_where_asked(kept: Path) -> None:
    comparison = compare(net(32), net(8), X, seconds=0.05, batches=[1, 3], in_torch=True)
    wheres = {"cpu", "cpu, batch 6", "torch", "torch.compile"}
    for side in (comparison.original, comparison.slim):
        assert side.latency.keys() == wheres
    assert comparison.speedups().keys() == wheres
    assert "cpu, batch 6 latency" in str(comparison)


def test_what_torch_cannot_compile_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    comparison = compare(net(32), net(8), X, seconds=0.05, in_torch=True)
    assert comparison.notes == ("torch.compile does not run it here: RuntimeError: no compiler",)
    assert "torch" in comparison.original.latency


def test_the_page_holds_all_and_needs_nothing_else(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for words in ("parameters", "676", "cpu latency", "Gemm", "by operator", "node by node"):
        assert words in text
    assert not re.findall(r"(?:src|href)=", text)
    comparison.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(comparison.to_json())


def test_names_in_the_page_are_text_and_nothing_more(comparison: Comparison) -> None:
    place = NodeTime("<b>", "<script>alert(1)</script>", "Conv", 1e-3)
    original = dataclasses.replace(comparison.original, places=(place,))
    strange = dataclasses.replace(comparison, original=original, inputs="<i>")
    text = page(strange)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<i>" not in text


def test_the_files_are_kept_where_a_folder_is_given(comparison: Comparison, kept: Path) -> None:
    assert sorted(file.name for file in kept.iterdir()) == ["original.onnx", "slim.onnx"]
    assert comparison.slim.file is not None
    assert comparison.slim.file.bytes == (kept / "slim.onnx").stat().st_size


def test_the_speed_up_is_the_ratio_of_the_medians(comparison: Comparison) -> None:
    before, after = (side.latency["cpu"] for side in (comparison.original, comparison.slim))
    assert comparison.speedups() == {"cpu": before.steadiest.median / after.steadiest.median}


def test_json_holds_everything(comparison: Comparison) -> None:
    read = json.loads(comparison.to_json())
    assert read == json.loads(json.dumps(comparison.as_dict()))
    assert read["original"]["latency"]["cpu"]["cpu"]["median"] > 0
    assert read["inputs"] == "(float32[2, 16])"
    assert set(read["versions"]) == {"graphprune", "torch", "onnx", "onnxruntime"}
    assert read["machine"]["cpu"]


def test_the_table_has_a_row_for_each_quantity(comparison: Comparison) -> None:
    text = str(comparison)
    for words in ("parameters", "multiply-adds", "bytes of ONNX", "cpu latency", "torch 2"):
        assert words in text
    row = next(line for line in text.splitlines() if "parameters" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["parameters", "676", "172", "0.254"]


def test_a_model_that_cannot_be_exported_is_reported_with_the_reason() -> None:
    comparison = compare(Refused(), nn.ReLU(), X, seconds=0.1)
    assert comparison.original.file is None
    assert comparison.original.latency == {}
    assert comparison.slim.latency
    assert comparison.speedups() == {}
    assert "original is not exported: the model cannot be exported to ONNX:" in str(comparison)
    assert "not exported" in str(comparison).split("cpu latency")[1].splitlines()[0]


def test_exported_programs_are_compared_as_modules_with_shared_parameters_counted_once() -> None:
    shared = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    comparison = compare(model, torch.export.export(model, (X,)), X, seconds=0.1)
    assert comparison.original.parameters == comparison.slim.parameters == 256
    assert comparison.original.macs == comparison.slim.macs == 2 * 2 * 16 * 16
    assert "slim is exported for this batch size only" in str(comparison)
