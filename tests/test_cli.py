"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli import app, load_model
from graphprune.cli import load_batches as batches_of_a_file
from tests.models import example

BUILDER = "tests.test_cli:build"


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 8, 3, 16, 16, generator=generator)
    return [(part, part.mean()) for part in images]


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.mean() - target).square()


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_slim_writes_a_model_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "slim.pt"
    report = json.loads(run("slim", BUILDER, "--out", str(out), "--ratio", "0.5", "--json"))
    assert report["verified"]
    assert report["form"] == "module"
    assert torch.load(out, weights_only=False)[0].out_channels == 16
    assert report["parameters"][1] == gp.count_parameters(torch.load(out, weights_only=False))


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    command = "from graphprune.cli import app; app()"
    out = str(tmp_path / "slim.pt")
    done = subprocess.run(
        [sys.executable, "-c", command, "slim", BUILDER, "--out", out, "--ratio", "0.3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.startswith("graphprune: warning: asked to remove 30% of channels, and 25% go: ")


def test_slim_chooses_and_repairs_on_data(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.concatenate([part.numpy() for part, _ in batches()]))
    common = ["slim", BUILDER, "--ranking", "global", "--json"]

    def weight(name: str, *words: str) -> torch.Tensor:
        out = str(tmp_path / name)
        run(*common, "--out", out, *words)
        held: torch.Tensor = torch.load(out, weights_only=False)[2].weight
        return held

    by_loss = ["--importance", "taylor", "--loss", "tests.test_cli:loss"]
    of_callable = weight("a.pt", "--data", "tests.test_cli:batches", *by_loss)
    as_cut = weight("b.pt")
    repaired = weight("c.pt", "--data", str(tmp_path / "images.npy"), "--compensate")
    assert of_callable.shape == as_cut.shape == repaired.shape == (8, 16, 3, 3)
    assert not torch.equal(as_cut, repaired)
    assert not torch.equal(as_cut, of_callable)


def test_slim_uses_the_processes_of_torchrun(tmp_path: Path) -> None:
    command = ["slim", BUILDER, "--importance", "taylor", "--compensate", "--json"]
    command += ["--data", "tests.test_cli:batches", "--loss", "tests.test_cli:loss"]
    run(*command, "--out", str(tmp_path / "one.pt"))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    script = Path(sys.executable).with_name("graphprune")
    done = subprocess.run(
        [*torchrun, "--no-python", script, *command, "--out", tmp_path / "two.pt"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (report,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert report["file"] == str(tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in ("one", "two"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_slim_writes_onnx_and_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / "slim.onnx"
    text = run("slim", BUILDER, "--out", str(out), "--input", "1,3,16,16")
    assert "parameters" in text
    assert "macs" in text
    onnx.checker.check_model(str(out))


def test_run_writes_what_a_pipeline_makes_of_a_model(tmp_path: Path) -> None:
    out, text = tmp_path / "out.pt", "slim-channels{ratio=0.25}, fold-batch-norm"
    report = json.loads(run("run", BUILDER, text, "--out", str(out), "--json"))
    assert report["changed"] == "slim-channels"
    assert report["parameters"][1] == gp.count_parameters(torch.load(out, weights_only=False))
    assert "macs" in run("run", BUILDER, text, "--out", str(tmp_path / "out.onnx"))
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def test_inspect_prints_groups_and_explains_a_parameter() -> None:
    shown = run("inspect", BUILDER)
    assert "1 groups that can be cut" in shown
    assert "#0 0.weight:0  32 channels, exact, in 3 places" in shown
    assert "a dimension of the model's output" not in shown
    assert "a dimension of the model's output" in run("inspect", BUILDER, "--why")
    assert "2.weight dimension 1: 0.weight:0" in run("inspect", BUILDER, "--group", "0")
    found = json.loads(run("inspect", BUILDER, "--json"))
    members = [(m["parameter"], m["dim"]) for m in found["groups"][0]["members"]]
    assert members == [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
    words = ["inspect", BUILDER, "--parameter", "2.bias"]
    assert "a dimension of the model's output" in run(*words)
    (explanation,) = json.loads(run(*words, "--json"))
    assert explanation["parts"][0]["fixed"].startswith(
        "a dimension of the model's output (output, 2"
    )


def test_inspect_and_slim_write_pages(tmp_path: Path) -> None:
    assert run("inspect", BUILDER, "--html", str(tmp_path / "graph.html")) == ""
    assert "0.weight:0" in (tmp_path / "graph.html").read_text()
    run("inspect", BUILDER, "--out", str(tmp_path / "graph.json"))
    assert json.loads((tmp_path / "graph.json").read_text())["title"] == BUILDER
    report = tmp_path / "report.html"
    run("slim", BUILDER, "--out", str(tmp_path / "slim.pt"), "--report", str(report))
    assert "Where the time goes" in report.read_text()


def test_slim_shrinks_a_checkpoint_on_disk(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_file(build().state_dict(), source)
    words = ["slim", BUILDER, "--checkpoint", str(source), "--input", "1,3,16,16", "--json"]
    report = json.loads(run(*words, "--out", str(tmp_path / "slim")))
    assert report["parameters"][1] < report["parameters"][0]
    assert report["bytes"][1] == 4 * report["parameters"][1]
    wanted = gp.slim(build(), 0.5, torch.randn(1, 3, 16, 16))
    loaded = gp.load(tmp_path / "slim", build(), torch.randn(1, 3, 16, 16))
    assert torch.equal(loaded[2].weight, wanted[2].weight)


def test_slim_builds_the_model_of_a_checkpoint_from_its_config(tmp_path: Path) -> None:
    source = tmp_path / "source"
    example("llama").model.save_pretrained(source)
    words = ["slim", "--checkpoint", str(source), "--out", str(tmp_path / "slim"), "--json"]
    report = json.loads(run(*words))
    assert report["from_pretrained"]
    assert report["form"] == "module"


def test_compare_gives_json(tmp_path: Path) -> None:
    torch.save(gp.slim(build(), 0.5), tmp_path / "slim.pt")
    found = run("compare", BUILDER, str(tmp_path / "slim.pt"), "--input", "1,3,16,16", "--json")
    assert json.loads(found)["slim"]["parameters"] < json.loads(found)["original"]["parameters"]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "no.such.module:build"],
        ["inspect", "tests.test_cli"],
        ["inspect", "missing.pt"],
        ["inspect", BUILDER, "--input", "a,b"],
        ["slim", BUILDER, "--out", "x.pt", "--ratio", "2"],
        ["run", BUILDER, "slim", "--out", "x.pt"],
        ["slim", "--out", "x.pt"],
        ["slim", BUILDER, "--out", "x", "--checkpoint", "missing"],
        ["slim", BUILDER, "--out", "x", "--checkpoint", "missing", "--compensate"],
        ["slim", BUILDER, "--out", "x.tflite"],
        ["slim", BUILDER, "--out", "missing/x.onnx"],
        ["slim", BUILDER, "--out", "x.pt", "--report", "x.pdf"],
        ["slim", BUILDER, "--out", "pyproject.toml", "--checkpoint", "."],
        ["run", BUILDER, "", "--out", "x.pt"],
        ["run", BUILDER, "fold-batch-norm", "--out", "x.safetensors"],
        ["inspect", BUILDER, "--out", "x.docx"],
        ["inspect", BUILDER, "--input", "2,-6"],
        ["inspect", BUILDER, "--input", "ints:2,6"],
        ["inspect", "tests.test_cli:fails"],
        ["compare", BUILDER, BUILDER, "--out", "x.pdf"],
    ],
)
def test_a_mistake_is_one_line_and_a_status(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert result.stderr.startswith("graphprune: ")
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1


def fails() -> nn.Module:
    return 1 + nn.ReLU()  # type: ignore[operator]


def test_a_mistake_in_the_users_own_code_is_found_there() -> None:
    said = CliRunner().invoke(app, ["inspect", "tests.test_cli:fails"]).stderr
    assert "TypeError: unsupported operand" in said
    assert "test_cli.py:" in said
    assert "in fails)" in said


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x80\x02"])
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.pt2", "m.npy"])
def test_files_that_are_none_are_said_in_a_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    read = batches_of_a_file if name.endswith(".npy") else load_model
    with pytest.raises(gp.InvalidRequestError, match=r"cannot be loaded|holds no array"):
        read(str(tmp_path / name))


class Own(nn.Sequential):
    """A class that is not PyTorch's."""


def test_files_of_layers_of_pytorch_run_no_code_and_others_are_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [nn.LSTM(3, 4), nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2)]
    torch.save(nn.Sequential(build(), *layers), tmp_path / "plain.pt")
    assert isinstance(load_model(str(tmp_path / "plain.pt"))[2], nn.MultiheadAttention | nn.LSTM)
    assert capsys.readouterr().err == ""
    torch.save(Own(nn.ReLU()), tmp_path / "own.pt")
    assert isinstance(load_model(str(tmp_path / "own.pt")), Own)
    assert "files you trust only" in capsys.readouterr().err


def test_the_folder_hides_no_installed_package_and_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "    import beside\n    return nn.Linear(6, 8)"
    lines = f"import colorsys\nfrom torch import nn\ndef build():\n{body}"
    (tmp_path / "mine.py").write_text(lines)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('hidden')")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "beside", "colorsys"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path), list(sys.meta_path)
    run("inspect", "mine:build", "--input", "2,6")
    assert (sys.path, sys.meta_path) == before


def test_slim_writes_what_load_reads(tmp_path: Path) -> None:
    run("slim", BUILDER, "--out", str(tmp_path / "slim.safetensors"))
    assert gp.load(tmp_path / "slim.safetensors", build())[0].out_channels == 16
