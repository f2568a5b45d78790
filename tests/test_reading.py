"""What an output of an operator asks for is asked only where something reads that output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.rules import Call, Layouts


class Spatial(nn.Module):
    """The spatial gate of CBAM: the largest and the mean channel at each place."""

    def __init__(self, largest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.gate = nn.Conv2d(2, 1, 3, padding=1)
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        both = torch.stack((self.largest(x), x.mean(1)), 1)
        return self.o(x * self.gate(both).sigmoid())  # type: ignore[no-any-return]


def left(model: nn.Module, x: Tensor | None = None) -> int:
    """Return how many channels are left of the first layer when half of all are asked to go."""
    x = torch.randn(2, 3, 6, 6) if x is None else x
    with pytest.warns(gp.GraphPruneWarning):  # a statistic over fewer, or nothing can be cut
        result = gp.slimmed(model.eval(), 0.5, x, align=1, renormalised=True)
    assert result.verification is not None
    return int(result.model.a.weight.shape[0])


UNREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(1),
    "max": lambda x: torch.max(x, 1)[0],
    "max, kept": lambda x: x.max(1, keepdim=True).values.squeeze(1),
    "min": lambda x: torch.min(x, 1)[0],
    "median": lambda x: x.median(1).values,
    "nanmedian": lambda x: x.nanmedian(1).values,
    "mode": lambda x: x.mode(1).values,
    "largest of all": lambda x: x.max() + x.sum(1),
    "argmax that is dropped": lambda x: (x.argmax(1), x.amax(1))[1],
}

READ: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.max(1)[1] + x.sum(1),
    "view first": lambda x: x.max(1)[1].unsqueeze(1).double().mean(1) + x.sum(1),
    "by code": lambda x: x.sum(1) * len(set(x.max(1)[1].flatten().tolist())),
    "gather": lambda x: x.gather(1, x.min(1, keepdim=True)[1]).squeeze(1),
    "argmax": lambda x: x.argmax(1) + x.sum(1),
}


@pytest.mark.parametrize("name", UNREAD)
def test_numbers_of_channels_that_nothing_reads_fix_none(name: str) -> None:
    assert left(Spatial(UNREAD[name])) == 8


@pytest.mark.parametrize("name", READ)
def test_numbers_of_channels_that_something_reads_fix_them(name: str) -> None:
    assert left(Spatial(READ[name])) == 16


@pytest.mark.parametrize("form", ["module", "graph"])
def test_a_model_that_returns_the_numbers_reads_them(form: str) -> None:
    class Numbered(Spatial):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x), self.a(x).max(1)  # type: ignore[return-value]

    graph = gp.analyze(Numbered(UNREAD["max"]).eval(), torch.randn(2, 3, 6, 6))
    assert [group.name for group in graph.groups] == []
    assert "slots are compared and numbered" in str(graph.explain("a.weight", 0))


def test_numbers_that_a_buffer_holds_in_the_end_are_read() -> None:
    class Remembering(Spatial):
        def __init__(self) -> None:
            super().__init__(self.remembered)
            self.register_buffer("last", torch.zeros(2, 6, 6, dtype=torch.int64))

        def remembered(self, x: Tensor) -> Tensor:
            values, self.last = x.max(1)
            return values

    graph = gp.analyze(Remembering().eval(), torch.randn(2, 3, 6, 6))
    assert [group.name for group in graph.groups] == []


@pytest.mark.parametrize("used", [0, 1])
def test_a_rule_of_ones_own_may_ask_for_what_is_read(used: int) -> None:
    def first(call: Call) -> list[Layouts]:
        layouts = call.layouts("x")
        call.when_read(1, lambda: call.fix(layouts[1], "its first slot is read"))
        return [layouts, [layouts[0], call.fixed(1, "the first"), *layouts[2:]]]

    with torch.library._scoped_library("reading", "FRAGMENT") as library:
        library.define("first(Tensor x) -> (Tensor, Tensor)")
        for key in ("CPU", "Meta"):
            library.impl("first", lambda x: (x * 2, x[:, :1] * 1), key)
        gp.rule(torch.ops.reading.first)(first)
        model = Spatial(lambda x: torch.ops.reading.first(x)[used].amax(1)).eval()
        graph = gp.analyze(model, torch.randn(2, 3, 6, 6))
        gp.rules.unregister(torch.ops.reading.first)
    assert ("its first slot is read" in str(graph.explain("a.weight", 0))) == bool(used)
