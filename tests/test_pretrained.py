"""Slim transformers models go through `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.utils.inputs import call, output_tensors
from tests.models import Example, example, import_transformers

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


SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
TOKENS = {"input_ids": torch.tensor([[1, 5, 7, 2], [3, 9, 4, 8]])}
IMAGES = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}

# Classes of models, their configs, and what has to be in the config of the slim model: numbers that the
# config does not hold, that show in no shape, or that stand in lists.
KINDS: dict[str, tuple[str, str, dict[str, Any], bool, dict[str, Any]]] = {
    "head size left open": (
        "Qwen2ForCausalLM", "Qwen2Config", {**SIZES, "vocab_size": 30, "num_key_value_heads": 2}, False,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    ),
    "head size of images left open": (
        "ViTModel", "ViTConfig", {**SIZES, "image_size": 16, "patch_size": 8}, False,
        {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 16, "intermediate_size": 48},
    ),
    "heads in no shape": (
        "BertForSequenceClassification", "BertConfig", {**SIZES, "vocab_size": 30}, True,
        {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 512},
    ),
    "heads in no shape, under another name": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 30, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        True, {"n_embd": 32, "n_head": 2, "n_inner": None},
    ),
    "lists": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}, False,
        {"embedding_size": 8, "hidden_sizes": [16, 32]},
    ),
    "a factor": (
        "Dinov2Model", "Dinov2Config",
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_ratio": 2,
         "image_size": 16, "patch_size": 8}, False,
        {"mlp_ratio": 1, "num_attention_heads": 2, "head_dim": 16},
    ),
}  # fmt: skip


def built(kind: str, config: str, numbers: dict[str, Any]) -> Any:
    """Return a model as it is before any training: small weights, so that outputs differ little."""
    transformers = import_transformers()
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**numbers)).eval()


def cut(model: nn.Module, inputs: Any, renormalised: bool, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gp.GraphPruneWarning)
        return gp.slimmed(model, 0.5, inputs, align=1, renormalised=renormalised, **options)


@pytest.mark.parametrize("name", KINDS)
def test_the_config_says_what_the_slim_model_computes(name: str, tmp_path: Path) -> None:
    kind, config, numbers, renormalised, wanted = KINDS[name]
    model = built(kind, config, numbers)
    inputs = IMAGES if model.main_input_name == "pixel_values" else TOKENS
    result = cut(model, inputs, renormalised)
    gp.save_pretrained(result, tmp_path / "by us")
    result.model.save_pretrained(tmp_path / "by itself")
    for folder in ("by us", "by itself"):
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        assert {key: getattr(loaded.config, key) for key in wanted} == wanted
        models = (loaded, result.model)
        outputs = [list(output_tensors(call(m, gp.Inputs.of(inputs)))) for m in models]
        for (_, a), (_, b) in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_models_own_config_follows_so_that_it_saves_itself(tmp_path: Path) -> None:
    kind, config, numbers, renormalised, wanted = KINDS["head size left open"]
    model = built(kind, config, numbers)
    before = model.config.to_dict()
    result = cut(model, TOKENS, renormalised)
    assert model.config.to_dict() == before
    assert {key: getattr(result.model.config, key) for key in wanted} == wanted
    assert result.model.model.layers[0].self_attn.config is result.model.config
    result.model.save_pretrained(tmp_path)
    loaded = type(result.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, result.model(**TOKENS).logits)


def test_a_config_of_the_right_shapes_but_other_numbers_is_refused(tmp_path: Path) -> None:
    """Gemma multiplies embeddings by the root of the hidden size, which the slim model keeps."""
    numbers = {**SIZES, "vocab_size": 30, "num_key_value_heads": 2, "head_dim": 16}
    result = cut(built("Gemma2ForCausalLM", "Gemma2Config", numbers), TOKENS, True)
    stale = {size.name: size.value for size in result.ambiguous_sizes}
    assert stale["config.intermediate_size"] == numbers["intermediate_size"]
    assert result.model.config.intermediate_size == numbers["intermediate_size"]
    with pytest.raises(gp.InvalidRequestError, match="no Gemma2Config says the sizes"):
        gp.save_pretrained(result, tmp_path)


def test_leaving_whole_what_the_error_names_lets_a_config_say_the_rest(tmp_path: Path) -> None:
    model = built("BertModel", "BertConfig", {**SIZES, "num_hidden_layers": 2, "vocab_size": 30})
    with pytest.raises(gp.InvalidRequestError) as error:
        gp.save_pretrained(cut(model, TOKENS, False), tmp_path)
    assert "of='channels'" not in str(error.value)
    advice = str(error.value).partition("slim with exclude=")[2]
    exclude = ast.literal_eval(advice[: advice.index("]") + 1])
    assert exclude == ["encoder.layer.*.attention.self.query.weight:0.0"]
    gp.save_pretrained(cut(model, TOKENS, False, exclude=exclude), tmp_path)
    assert type(model).from_pretrained(tmp_path).config.intermediate_size == 48
