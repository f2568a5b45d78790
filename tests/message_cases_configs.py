"""What is said where no config says the sizes of a slim model; see message_cases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.transformers_config import pretrained
from tests.message_cases import case
from tests.models import import_transformers

TOKENS = {"input_ids": torch.tensor([[1, 5, 7, 2], [3, 9, 4, 8]])}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 30,
}  # fmt: skip


def bert() -> nn.Module:
    transformers = import_transformers()
    model: nn.Module = transformers.BertModel(transformers.BertConfig(**SIZES))
    return model.eval()


def llama() -> nn.Module:
    transformers = import_transformers()
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return model.eval()


@case(
    r"the config of the slim BertModel still says the sizes of the original, since none can say all of its "
    r"own: what its save_pretrained writes cannot be loaded; use graphprune\.save, or leave whole the "
    r"groups that graphprune\.save_pretrained names"
)
def a_config_that_stays_as_it_was(folder: Path) -> None:
    gp.slim(bert(), 0.5, TOKENS, align=1)


@case(
    r"no BertConfig says the sizes of the slim model: hidden_size would have to be 32 for \S+ and 16 for "
    r"encoder\.layer\.0\.attention\.\S+; slim with "
    r"exclude=\['encoder\.layer\.\*\.attention\.self\.query\.weight:0\.0'\], which leaves these groups "
    r"whole, or use graphprune\.save, which needs no config"
)
def heads_that_no_config_says(folder: Path) -> None:
    gp.save_pretrained(gp.slimmed(bert(), 0.5, TOKENS, align=1), folder)


@case(
    r"no LlamaConfig says the sizes of the slim model: intermediate_size would have to be \d+ for "
    r"model\.layers\.0\.mlp\.\S+ and \d+ for model\.layers\.1\.mlp\.\S+; cut every layer alike "
    r"\(of='channels', ranking='uniform'\), or slim with "
    r"exclude=\['model\.layers\.\*\.mlp\.gate_proj\.weight:0'\], which leaves these groups whole, or use "
    r"graphprune\.save, which needs no config"
)
def layers_of_uneven_width(folder: Path) -> None:
    plan = gp.slimmed(llama(), 0.5, TOKENS, align=1).plan
    uneven = "model.layers.1.mlp.gate_proj.weight:0"
    keep = {**plan.keep, uneven: [*range(30)]}
    plan = gp.Plan(keep, plan.sizes, {"of": "parameters"})
    gp.save_pretrained(gp.slimmed(llama(), example_inputs=TOKENS, plan=plan), folder)


@case(
    r"no LlamaConfig says the sizes of the slim model: intermediate_size would have to be .*; none of the "
    r"groups that are cut can be said by one, or use graphprune\.save, which needs no config"
)
def nothing_that_a_config_says(folder: Path) -> None:
    include = ["*layers.0.mlp*"]
    gp.save_pretrained(gp.slimmed(llama(), 0.5, TOKENS, align=1, include=include), folder)


@case(
    r"WithWidth cannot be built from what its LlamaConfig writes, as from_pretrained would \(TypeError: "
    r".*width.*\); use graphprune\.save"
)
def a_model_of_more_than_its_config(folder: Path) -> None:
    transformers = import_transformers()

    class WithWidth(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
        def __init__(self, config: Any, width: int) -> None:
            super().__init__(config)
            self.width = width

    model = WithWidth(transformers.LlamaConfig(**SIZES), 3).eval()
    gp.save_pretrained(gp.slimmed(model, 0.5, TOKENS, align=1), folder)


@case(
    r"the slim model is a graph, which no config builds: asked for; use graphprune\.save",
)
def a_graph_of_a_transformer(folder: Path) -> None:
    gp.save_pretrained(gp.slimmed(llama(), 0.5, TOKENS, align=1, form="graph"), folder)


@case(
    r"LlamaForCausalLM built from a config of the slim model's sizes gives other values than the slim "
    r"model: its code computes something from the config that no operator shows; use graphprune\.save"
)
def a_config_that_gives_other_values(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pretrained, "_gives_the_same", lambda *_: False)
        gp.save_pretrained(gp.slimmed(llama(), 0.5, TOKENS, align=1), folder)
