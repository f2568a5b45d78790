"""What the blocks of random networks are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """Layers, and a function of them and the data."""

    def __init__(self, forward: Forward, width: int, **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        self.width = width
        for name, layer in layers.items():
            if isinstance(layer, Tensor):
                self.register_parameter(name, nn.Parameter(layer))
            else:
                self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_disorder(width: int) -> Tensor:
    """Return the numbers below a width in an order that is no other's backwards."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(width))


def divisor(width: int, detail: int) -> int:
    """Return one of the divisors of a width."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return divisors[detail % len(divisors)]
