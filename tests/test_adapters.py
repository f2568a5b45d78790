"""Adapters in a model: their rank stays, since their configuration says it, and the rest is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp


class Lora(nn.Module):
    """A linear layer with adapters by name, held as peft holds them."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer, self.r, self.scaling = base, {"default": rank}, {"default": 2.0}
        self.in_features, self.out_features = base.in_features, base.out_features
        down, up = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, x: Tensor) -> Tensor:
        change = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + change * self.scaling["default"]


class Adapted(nn.Module):
    def __init__(self, kind: Any = Lora) -> None:
        super().__init__()
        self.first, self.last = kind(nn.Linear(12, 32), 4), kind(nn.Linear(32, 5), 4)
        self.peft_config = {"default": SimpleNamespace(r=4, lora_alpha=8)}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class ByHand(Lora):
    """The same without a configuration that says its rank."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()


def test_the_rank_stays_and_what_the_adapter_shares_with_its_layer_is_cut() -> None:
    slimmer = gp.slim(Adapted(), 0.5, torch.randn(2, 12), align=1)
    assert slimmer.first.base_layer.weight.shape == (16, 12)
    assert slimmer.first.lora_A["default"].weight.shape == (4, 12)
    assert slimmer.first.lora_B["default"].weight.shape == (16, 4)
    assert slimmer.last.lora_A["default"].weight.shape == (4, 16)
    assert (slimmer.peft_config["default"].r, slimmer.first.r) == (4, {"default": 4})


def test_the_rank_says_why_it_stays() -> None:
    graph = gp.analyze(Adapted(), torch.randn(2, 12))
    why = {(fixed.parameter, fixed.dim): fixed.reason.why for fixed in graph.fixed}
    assert why["first.lora_A.default.weight", 0] == (
        "the rank of an adapter, which its configuration says too"
    )


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_a_rank_that_no_configuration_says_is_cut_like_any_group() -> None:
    slimmer = gp.slim(Adapted(ByHand), 0.5, torch.randn(2, 12), align=1)
    assert slimmer.first.lora_A["default"].weight.shape == (2, 12)
