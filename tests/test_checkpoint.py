"""Checkpoints that are planned and shrunk on disk, a block of rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp

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
