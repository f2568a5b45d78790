"""The main calls, once each, with whatever versions are installed: run by `make lowest`, without pytest."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli import app
from graphprune.inspection import SUFFIXES

NAMES = ("networkx", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "typer")


class Recurrent(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Linear(6, 16),
            nn.GRU(16, 32, batch_first=True),
            nn.Linear(32, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu())[0])


def main() -> None:
    print(", ".join(f"{name} {version(name)}" for name in NAMES))
    for command in ([], ["slim"], ["run"], ["inspect"], ["compare"]):
        assert "Usage" in CliRunner().invoke(app, [*command, "--help"]).output, command
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(5, 2, 6)
    result = gp.slimmed(model, 0.5, x)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gp.save(result, folder / "slim.safetensors")
        loaded = gp.load(folder / "slim.safetensors", Recurrent(), x).eval()
        assert torch.equal(loaded(x), result.model(x))
        result.plan.save(folder / "plan.json")
        assert gp.Plan.load(folder / "plan.json") == result.plan
        for suffix in SUFFIXES:
            result.graph.save(folder / f"graph{suffix}")
        comparison = gp.compare(model, result.model, x, seconds=0.05)
        assert comparison.slim.file is not None, comparison.slim.reason
        result.report(folder / "report.html", comparison=comparison)
        assert gp.export(result.model, x, folder / "slim.onnx").difference < 1e-4
    print("all is well")


if __name__ == "__main__":
    main()
