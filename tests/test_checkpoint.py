"""Checkpoints that are planned and shrunk on disk, a block of rows at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import graphprune as gp
from graphprune.checkpoint import shrink
from graphprune.utils.safetensors_blocks import INDEX

TOKENS = {"input_ids": torch.tensor([[1, 5, 7, 2], [3, 9, 4, 8]])}


def config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 50, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**(sizes | changes))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**changes)).to(torch.bfloat16).eval()


def without_weights(**changes: Any) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config(**changes)).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_checkpoint_is_shrunk_as_the_model_in_memory_is(source: Path, tmp_path: Path) -> None:
    result = gp.slimmed(llama(), 0.25, TOKENS)
    done = gp.shrink_checkpoint(without_weights(), result.plan, source, tmp_path / "slim", TOKENS)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.bfloat16)
    wanted = result.model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert done.bytes_after < done.bytes_before


@pytest.mark.parametrize("importance", ["l1", "l2", "lamp", "random"])
def test_scores_from_files_are_those_in_memory(source: Path, importance: str) -> None:
    options: dict[str, Any] = {"importance": importance, "verify": False}
    wanted = gp.slimmed(llama(), 0.25, TOKENS, **options)
    found = gp.slimmed(without_weights(), 0.25, TOKENS, weights=source, **options)
    assert found.scores is not None
    assert wanted.scores is not None
    assert found.scores.keys() == wanted.scores.keys()
    assert all((found.scores[name] == scores).all() for name, scores in wanted.scores.items())
    assert found.plan.keep == wanted.plan.keep


def test_what_was_written_is_read_by_from_pretrained_and_generates(
    source: Path, tmp_path: Path
) -> None:
    result = gp.slimmed(llama(), 0.25, TOKENS)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("")
    done = gp.shrink_checkpoint(without_weights(), result.plan, source, tmp_path, TOKENS)
    assert done.has_config
    assert (tmp_path / "tokenizer.json").exists()
    assert not (tmp_path / "pytorch_model.bin").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, result.model(**TOKENS).logits)
    prompt = TOKENS["input_ids"][:1]
    assert loaded.generate(prompt, max_new_tokens=1, min_new_tokens=1).shape == (1, 5)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.bytes_after
    assert set(index["weight_map"].values()) == set(done.files)
    assert {path.name for path in source.glob("*.safetensors")} == set(done.files)
    with safe_open(tmp_path / done.files[0], "pt") as file:
        assert file.metadata()["format"] == "pt"


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.BatchNorm2d(8)
    ).eval()  # fmt: skip


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("importance", ["l2", "bn_scale"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_single_file_is_shrunk_and_loaded(importance: str, device: str, tmp_path: Path) -> None:
    model = convolutions()
    model[1].weight.data.uniform_(0.5, 2)
    source = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), source)
    wanted = gp.slimmed(model, 0.5, IMAGES, importance=importance)
    empty = convolutions().to("meta")
    found = gp.slimmed(empty, 0.5, IMAGES, importance=importance, weights=source)
    assert found.plan.keep == wanted.plan.keep
    done = gp.shrink_checkpoint(empty, found.plan, source, tmp_path / "slim", IMAGES)
    assert not done.has_config
    loaded = gp.load(tmp_path / "slim", convolutions().to(device), IMAGES).eval()
    assert torch.equal(loaded(IMAGES), wanted.model(IMAGES))
    assert loaded[3].in_channels == 16


@pytest.mark.filterwarnings("ignore:the config of the slim LlamaForCausalLM")
def test_layers_of_uneven_width_are_loaded_by_their_plan(source: Path, tmp_path: Path) -> None:
    result = gp.slimmed(llama(), 0.25, TOKENS, of="parameters")
    kept = {len(keep) for name, keep in result.plan.keep.items() if "mlp" in name}
    assert len(kept) > 1
    with pytest.warns(
        gp.GraphPruneWarning, match=r"intermediate_size would have to be \d+ for model\.layers\.0"
    ):
        done = gp.shrink_checkpoint(without_weights(), result.plan, source, tmp_path, TOKENS)
    assert not done.has_config
    with pytest.raises(OSError, match=r"config\.json.* is not a valid JSON"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    loaded = gp.load(tmp_path, llama(), TOKENS)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, result.model(**TOKENS).logits)


@pytest.mark.filterwarnings("ignore:the config of the slim LlamaForCausalLM")
def test_a_config_that_would_compute_other_numbers_is_not_written(
    source: Path, tmp_path: Path
) -> None:
    """Features of heads can be cut, but which turn how fast is computed from their number."""
    include = [g.name for g in gp.analyze(without_weights(), TOKENS).groups if g.inner]
    plan = gp.slimmed(llama(), 0.5, TOKENS, include=include).plan
    assert plan.removed
    with pytest.warns(gp.GraphPruneWarning, match="no LlamaConfig says"):
        gp.shrink_checkpoint(without_weights(), plan, source, tmp_path, TOKENS)


def test_the_size_of_a_head_is_written_where_only_the_code_knows_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=50,
    )  # fmt: skip
    model = Qwen2ForCausalLM(sizes).eval()
    model.save_pretrained(tmp_path / "source")
    result = gp.slimmed(model, 0.5, TOKENS, align=1)
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(sizes)
    source, target = tmp_path / "source", tmp_path / "slim"
    assert gp.shrink_checkpoint(empty, result.plan, source, target, TOKENS).has_config
    loaded = Qwen2ForCausalLM.from_pretrained(target)
    assert (loaded.config.num_attention_heads, loaded.config.head_dim) == (4, 8)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, result.model(**TOKENS).logits)


@pytest.mark.parametrize("names", ["one", "both"])
def test_tied_weights_are_cut_under_each_name_that_is_there(names: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    source = tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if names == "one":
        del state["lm_head.weight"]
    save_file(state, source)
    with pytest.warns(gp.GraphPruneWarning, match="now over fewer of them"):
        result = gp.slimmed(model, 0.25, TOKENS, renormalised=True, verify=False)
    assert "model.embed_tokens.weight:1" in result.plan.keep
    empty = without_weights(tie_word_embeddings=True)
    gp.shrink_checkpoint(empty, result.plan, source, tmp_path / "slim", TOKENS)
    loaded = gp.load(tmp_path / "slim", llama(tie_word_embeddings=True), TOKENS)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    wanted, found = result.model.state_dict(), loaded.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    with safe_open(tmp_path / "slim" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)


def test_a_checkpoint_of_the_model_inside_will_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(sizes).eval()
    model.transformer.save_pretrained(tmp_path / "source")
    result = gp.slimmed(model, 0.5, TOKENS, include=["*mlp*"])
    with torch.device("meta"):
        empty = GPT2LMHeadModel(sizes)
    source, target = tmp_path / "source", tmp_path / "slim"
    assert gp.shrink_checkpoint(empty, result.plan, source, target, TOKENS).has_config
    loaded = GPT2LMHeadModel.from_pretrained(target)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, result.model(**TOKENS).logits)


class Literal(nn.Module):
    """A model whose code holds a size, so that its slim form is a graph, with tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.again = self.second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.again(self.second(self.first(x)).relu())
        return self.last(y.view(-1, 12).tanh())


def test_a_graph_is_loaded_by_its_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = Literal()
    save_model(model, tmp_path / "model.safetensors")
    result = gp.slimmed(model, 0.5, x)
    assert result.form == "graph"
    gp.shrink_checkpoint(model, result.plan, tmp_path, tmp_path / "slim", x)
    for fresh in (Literal(), Literal().to("meta")):
        assert torch.equal(gp.load(tmp_path / "slim", fresh, x)(x), result.model(x))


class Square(nn.Module):
    """Four heads of four, whose numbers are held in either order."""

    def __init__(self, order: tuple[str, str]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 6)
        for name in order:
            setattr(self, name, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], 3, self.heads, self.features)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(2, 3), -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("order", [("heads", "features"), ("features", "heads")])
def test_sizes_in_attributes_follow_without_weights_as_they_do_with_them(
    order: tuple[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Square(order), torch.randn(2, 5, 6)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    result = gp.slimmed(model, 0.5, x)
    wanted = result.model(x)
    assert result.form == "module"
    gp.shrink_checkpoint(model.to("meta"), result.plan, tmp_path, tmp_path / "slim", x)
    loaded = gp.load(tmp_path / "slim", Square(order), x)
    assert (loaded.heads, loaded.features) == (2, 4)
    assert torch.equal(loaded(x), wanted)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import graphprune as gp
from tests.test_checkpoint import TOKENS, without_weights

def fsync(file, real=os.fsync):
    if os.path.basename(os.readlink(f"/proc/self/fd/{file}")).startswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)

os.fsync = fsync
gp.shrink_checkpoint(without_weights(), gp.Plan.load(sys.argv[1]), sys.argv[2], sys.argv[3], TOKENS)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_is_taken_up_where_it_was(source: Path, tmp_path: Path) -> None:
    plan = gp.slimmed(without_weights(), 0.25, TOKENS, weights=source).plan
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = gp.shrink_checkpoint(without_weights(), plan, source, whole, TOKENS)
    plan.save(tmp_path / "plan.json")
    words = [str(tmp_path / "plan.json"), str(source), str(broken), f"{done.files[1]}."]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in broken.glob("model*")}
    [draft] = left - {done.files[0]}
    assert len(left) == 2
    assert draft.startswith(f"{done.files[1]}.")
    assert draft.endswith(".part")
    written = (broken / done.files[0]).stat().st_mtime_ns
    again = gp.shrink_checkpoint(without_weights(), plan, source, broken, TOKENS)
    assert again.kept == done.files[:1]
    assert (broken / done.files[0]).stat().st_mtime_ns == written
    assert contents(broken) == contents(whole)


def test_a_write_that_fails_leaves_nothing_that_looks_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = gp.slimmed(without_weights(), 0.25, TOKENS, weights=source).plan

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    def fails(path: Path, *rest: Any, real: Any = shrink.write_safetensors) -> None:
        with monkeypatch.context() as full:
            if "00002" in path.name:
                full.setattr("os.fsync", full_disk)
            real(path, *rest)

    monkeypatch.setattr(shrink, "write_safetensors", fails)
    with pytest.raises(OSError, match="no space left"):
        gp.shrink_checkpoint(without_weights(), plan, source, tmp_path, TOKENS)
    names = {path.name for path in tmp_path.iterdir() if "model" in path.name}
    assert "model-00002-of-00004.safetensors" not in names
    assert not any(name.endswith((".part", "index.json")) for name in names)


MEMORY = """
import sys
import torch
from torch import nn
import graphprune as gp

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

with torch.device("meta"):
    model = nn.Sequential(*[layer for _ in range(75) for layer in (nn.Linear(1024, 1024), nn.ReLU())])
x = torch.ones(1, 1024)
gp.slimmed(model, 0.25, x, importance="random")
before = peak()
plan = gp.slimmed(model, 0.25, x, importance="l2", weights=sys.argv[1]).plan
gp.shrink_checkpoint(model, plan, sys.argv[1], sys.argv[2], x)
print(peak() - before)
"""


def test_memory_is_that_of_blocks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: value
            for layer in range(0, 150, 2)
            for name, value in (
                (f"{layer}.weight", torch.randn(1024, 1024, generator=generator)),
                (f"{layer}.bias", torch.zeros(1024)),
            )
        },
        tmp_path / "model.safetensors",
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 300e6
    words = [str(tmp_path / "model.safetensors"), str(tmp_path / "slim")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *words], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) * 1024 < size / 4
