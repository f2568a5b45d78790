"""Slim transformers models go through `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.inputs import call, output_tensors
from tests.models import example

# Models, options of `slimmed`, and what has to change in the config.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": (
        "llama",
        {},
        {"intermediate_size", "num_attention_heads", "num_key_value_heads"},
    ),
    "llama_mlp": ("llama", {"include": ["*mlp*"]}, {"intermediate_size"}),
    "bert_mlp": ("bert", {"include": ["*intermediate*"]}, {"intermediate_size"}),
    "gpt2_mlp": ("gpt2", {"include": ["*mlp*"]}, {"n_inner"}),
    "t5": ("t5", {}, {"d_ff", "num_heads"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_slim_model_survives_its_folder(name: str, tmp_path: Path) -> None:
    model, options, changed = CASES[name]
    given = example(model)
    result = gp.slimmed(given.model, 0.5, given.inputs, **options)
    gp.save_pretrained(result, tmp_path)
    loaded = type(result.model).from_pretrained(tmp_path)
    before, after = given.model.config.to_dict(), loaded.config.to_dict()
    assert {key for key in changed if before[key] != after[key]} == changed
    assert gp.count_parameters(loaded) == gp.count_parameters(result.model)
    inputs = gp.Inputs.of(given.inputs)
    outputs = [list(output_tensors(call(each.eval(), inputs))) for each in (result.model, loaded)]
    for (_, a), (_, b) in zip(*outputs, strict=True):
        torch.testing.assert_close(b, a)
    assert given.model.config.to_dict() == before


@pytest.mark.parametrize("name", ["llama", "gpt2_mlp"])
def test_what_was_saved_generates(name: str, tmp_path: Path) -> None:
    model, options, _ = CASES[name]
    given = example(model)
    result = gp.slimmed(given.model, 0.5, given.inputs, **options)
    gp.save_pretrained(result, tmp_path)
    loaded = type(result.model).from_pretrained(tmp_path)
    prompt = torch.tensor([[1, 5, 7]])
    wanted, found = (
        each.generate(prompt, max_new_tokens=6, do_sample=False) for each in (result.model, loaded)
    )
    assert torch.equal(wanted, found)
    assert found.shape[1] > prompt.shape[1]
