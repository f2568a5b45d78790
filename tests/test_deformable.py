"""Deformable convolutions, whose offsets and mask come from convolutions of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from tests.deformable import deformable_convolution


class Deformed(nn.Module):
    """A layer, a deformable convolution of its channels in groups, and a layer behind it."""

    def __init__(self, groups: int, offset_groups: int) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.offset = nn.Conv2d(3, offset_groups * 18, 3, padding=1)
        self.mask = nn.Conv2d(3, offset_groups * 9, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16, 16 // groups, 3, 3))
        self.operator = deformable_convolution()

    def forward(self, x: Tensor) -> Tensor:
        y, offset = self.a(x), self.offset(x)
        groups = y.shape[1] // self.weight.shape[1], offset.shape[1] // 18  # as torchvision has it
        bias = torch.zeros(self.weight.shape[0])
        settings = (1, 1, 1, 1, 1, 1, *groups, True)
        return self.o(self.operator(y, self.weight, offset, self.mask(x), bias, *settings))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize(
    ("groups", "offset_groups", "offsets"), [(1, 1, 18), (4, 1, 18), (1, 4, 36), (4, 2, 18)]
)
def test_a_deformable_convolution_is_slimmed_with_its_groups(
    form: Any, groups: int, offset_groups: int, offsets: int
) -> None:
    model, x = Deformed(groups, offset_groups).eval(), torch.randn(2, 3, 7, 6)
    result = gp.slimmed(model, 0.5, x, align=1, form=form)
    assert result.verification is not None
    slim = dict(result.model.named_parameters())
    assert slim["a.weight"].shape[0] == 8
    assert slim["offset.weight"].shape[0] == offsets
    assert slim["mask.weight"].shape[0] == offsets // 2
    assert slim["weight"].shape[0] == 8
