"""How tensors lie in memory: a slim model's as the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp

FORMATS: list[tuple[Any, torch.memory_format, tuple[int, ...]]] = [
    (nn.Conv2d, torch.channels_last, (2, 3, 8, 8)),
    (nn.Conv3d, torch.channels_last_3d, (2, 3, 4, 4, 4)),
]


def net(conv: Any) -> nn.Sequential:
    layers = (conv(3, 32, 3, padding=1), nn.ReLU(), conv(32, 48, 3, padding=1, groups=4))
    return nn.Sequential(*layers, nn.ReLU(), conv(48, 8, 1))


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize(("conv", "memory_format", "shape"), FORMATS)
def test_weights_in_channels_last_stay_so(
    conv: Any, memory_format: torch.memory_format, shape: tuple[int, ...], form: Any
) -> None:
    model = net(conv).to(memory_format=memory_format)
    slimmer = gp.slim(model, 0.5, torch.randn(shape), form=form, align=1)
    weights = [weight for weight in slimmer.parameters() if weight.dim() > 1]
    assert [weight.shape[0] for weight in weights] == [16, 24, 8]
    assert all(weight.is_contiguous(memory_format=memory_format) for weight in weights)
    assert not weights[0].is_contiguous()


def test_the_format_survives_saving_and_loading(tmp_path: Path) -> None:
    model = net(nn.Conv2d).to(memory_format=torch.channels_last)
    result = gp.slimmed(model, 0.5, torch.randn(2, 3, 8, 8))
    gp.save(result, tmp_path / "slim.safetensors")
    loaded = gp.load(tmp_path / "slim.safetensors", model, torch.randn(2, 3, 8, 8))
    assert loaded[0].weight.stride() == result.model[0].weight.stride()
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_contiguous_and_transposed_weights_keep_the_order_of_their_strides() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight = nn.Parameter(torch.randn(16, 4).t())
    slimmer = gp.slim(model, 0.5, torch.randn(2, 6), align=1)
    assert (slimmer[0].weight.stride(), slimmer[2].weight.stride()) == ((6, 1), (1, 4))
