"""Slim transformers models go through `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.inputs import call, output_tensors
from tests.models import Example, example

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


def reloaded(name: str, folder: Path) -> tuple[Example, nn.Module, nn.Module]:
    """Return an example, its model slimmed, and what is left of that after a folder."""
    model, options, _ = CASES[name]
    given = example(model)
    result = gp.slimmed(given.model, 0.5, given.inputs, **options)
    gp.save_pretrained(result, folder)
    return given, result.model, type(result.model).from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_slim_model_survives_its_folder(name: str, tmp_path: Path) -> None:
    config = example(CASES[name][0]).model.config.to_dict()
    given, slim, loaded = reloaded(name, tmp_path)
    changed = {key for key, value in loaded.config.to_dict().items() if config[key] != value}
    assert changed >= CASES[name][2]
    assert gp.count_parameters(loaded) == gp.count_parameters(slim)
    inputs = gp.Inputs.of(given.inputs)
    outputs = [list(output_tensors(call(each.eval(), inputs))) for each in (slim, loaded)]
    for (_, a), (_, b) in zip(*outputs, strict=True):
        torch.testing.assert_close(b, a)
    assert given.model.config.to_dict() == config


@pytest.mark.parametrize("name", ["llama", "gpt2_mlp"])
def test_what_was_saved_generates(name: str, tmp_path: Path) -> None:
    _, *models = reloaded(name, tmp_path)
    prompt = torch.tensor([[1, 5, 7]])
    wanted, found = (m.generate(prompt, max_new_tokens=6, do_sample=False) for m in models)
    assert torch.equal(wanted, found)
    assert found.shape[1] > prompt.shape[1]
