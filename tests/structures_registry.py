"""How the small structures are written down: one idea each, a few lines, seeded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.models import randomise

Arguments = tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Structure:
    """A small model built anew at each call, always the same, and its inputs at batch 2."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Arguments]


STRUCTURES: dict[str, Structure] = {}


def register(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Arguments]) -> None:
    """Add a structure whose parameters and norm statistics are random.

    A parameter that does not train stays so, and buffers stay as they are built: structures are
    built under a fixed seed.
    """

    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
            return randomise(model, inputs())

    if name in STRUCTURES:
        raise ValueError(f"two structures are called {name!r}")
    STRUCTURES[name] = Structure(name, seeded, inputs)


def structure(inputs: Callable[[], Arguments]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class that takes no arguments, under its name in snake case."""

    def add(model: type[nn.Module]) -> type[nn.Module]:
        register(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", model.__name__).lower(), model, inputs)
        return model

    return add


class Between(nn.Module):
    """A layer, a function, a layer."""

    def __init__(
        self, first: nn.Module, function: Callable[[Tensor], Tensor], last: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.function, self.last = first, function, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def between(
    name: str,
    inputs: Callable[[], Arguments],
    first: Callable[[], nn.Module],
    function: Callable[[Tensor], Tensor],
    last: Callable[[], nn.Module],
) -> None:
    """Register a function between two layers; with no layers of its own it holds no parameter."""
    register(name, lambda: Between(first(), function, last()), inputs)


def normal(*shape: int, batch: int = 2, seed: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """Return inputs of one tensor: [batch, *shape] of unit normal noise, a little off zero."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, *shape, generator=generator) + 0.25,)

    return inputs


def tokens(length: int, vocabulary: int, seed: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """Return inputs of one tensor of token ids: [2, length]."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(0, vocabulary, (2, length), generator=generator),)

    return inputs


def both(*parts: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Return the inputs of all the parts, in order."""
    return lambda: tuple(tensor for part in parts for tensor in part())


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    """Return a convolution that keeps the image's size (at stride 1)."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


image = normal(3, 9, 8)
vector = normal(14)
series = normal(6, 11)


def wide() -> nn.Module:
    return nn.Sequential(conv(3, 24), nn.BatchNorm2d(24), nn.ReLU())


def out(channels: int = 24) -> nn.Module:
    return conv(channels, 7, 1)


def hidden() -> nn.Module:
    return nn.Sequential(nn.Linear(14, 20), nn.ReLU())


def head(features: int = 20) -> nn.Module:
    return nn.Linear(features, 5)
