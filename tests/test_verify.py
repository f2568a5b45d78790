"""What a verification holds, and for how long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune import verify


def test_an_attempt_that_failed_keeps_no_copies_of_the_models(monkeypatch: Any) -> None:
    class Folded(nn.Module):
        """Its code holds a size, so that its own class is tried and given up before the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (
                nn.Linear(6, 16),
                nn.Linear(16, 16),
                nn.Linear(16, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).relu()).view(-1, 4, 4)
            return self.head(x.reshape(-1, 16))  # type: ignore[no-any-return]

    copies: list[nn.Module] = []
    held: list[int] = []
    real = verify.silenced_copy

    def silenced_copy(*args: Any) -> nn.Module:
        held.append(sum(p.numel() for copy in copies for p in copy.parameters()))
        copies.append(real(*args))
        return copies[-1]

    monkeypatch.setattr(verify, "silenced_copy", silenced_copy)
    assert gp.slimmed(Folded(), 0.5, torch.randn(2, 6)).form == "graph"
    assert len(held) > 1
    assert not any(held)
