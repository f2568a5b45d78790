"""What is said of sizes that modules hold; see message_cases.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphprune as gp
from tests.message_cases import said


class Twice(nn.Module):
    """A width of two layers; nothing says of which."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.first, self.second, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def cut_unequally() -> nn.Module:
    keep = {"first.weight:0": list(range(8)), "second.weight:0": list(range(16))}
    plan = gp.Plan(keep, dict.fromkeys(keep, 24))
    slimmer: nn.Module = gp.slim(Twice(), example_inputs=torch.ones(2, 6), plan=plan)
    return slimmer


said(
    "width = 24: 8 or 16 now: sizes that modules hold and that stay as they were, since the dimensions "
    "that they may be of differ now; forward does not need them, but set them if other methods do",
    cut_unequally,
)
