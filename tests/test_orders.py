"""Channels that come in another order: backwards, or in one that the model holds as numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import graphprune as gp
from graphprune.shrink.reorder import reorder_slots

Forward = Callable[[Any, Tensor], Tensor]


class Reordered(nn.Module):
    """Two linear layers, and between them what `forward` does with the eight features."""

    def __init__(self, middle: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("order", torch.tensor([3, 0, 6, 2, 7, 1, 5, 4]))
        self.register_buffer("back", self.order.argsort() - 8, persistent=False)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, self.first(x).relu()))


INPUT = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))

# Ways to put channels in another order, and the form that the slim model takes.
WAYS: dict[str, tuple[Forward, str]] = {
    "flipped": (lambda m, x: x.flip(1), "module"),
    "flipped twice, once in the middle": (
        lambda m, x: torch.cat([half.flip(1) for half in x.flip(1).chunk(2, 1)], 1),
        "module",
    ),
    "by a buffer": (lambda m, x: x[:, m.order], "module"),
    "by a buffer, copied": (lambda m, x: x[:, m.order.clone().to(x.device)], "module"),
    "selected": (lambda m, x: x.index_select(1, m.order), "module"),
    "there and back": (lambda m, x: x[:, m.order].sigmoid()[:, m.back] + x, "module"),
    "two by the same buffer": (lambda m, x: x[:, m.order] * x.tanh()[:, m.order], "module"),
    "by numbers in the code": (lambda m, x: x[:, [3, 0, 6, 2, 7, 1, 5, 4]], "graph"),
}


@pytest.mark.parametrize(("middle", "form"), WAYS.values(), ids=list(WAYS))
def test_channels_in_another_order_are_cut(middle: Forward, form: str, tmp_path: Path) -> None:
    model = Reordered(middle)
    result = gp.slimmed(model, 0.5, INPUT, align=1)
    assert result.form == form
    assert result.model.first.weight.shape == (4, 6)
    file = gp.export(result.model, INPUT, tmp_path / "slim.onnx").path
    given = {onnxruntime.InferenceSession(file).get_inputs()[0].name: INPUT.numpy()}
    (found,) = onnxruntime.InferenceSession(file).run(None, given)
    np.testing.assert_allclose(found, result.model(INPUT).detach(), atol=1e-5)


def test_the_order_that_is_left_is_numbered_anew() -> None:
    model = Reordered(lambda m, x: x[:, m.order][:, m.back] + x)
    whole = gp.slimmed(model, 0.5, INPUT, align=1)
    kept = whole.plan.keep["first.weight:0"]
    left = [channel for channel in model.order.tolist() if channel in kept]
    assert whole.model.order.tolist() == [kept.index(channel) for channel in left]
    assert (whole.model.back % 4).tolist() == whole.model.order.argsort().tolist()
    assert model.order.tolist() == [3, 0, 6, 2, 7, 1, 5, 4]


STAYS: dict[str, tuple[Forward, str]] = {
    "numbers that are read": (
        lambda m, x: x[:, m.order] * m.order,
        "an order of channels that is read as numbers",
    ),
    "numbers that are sorted": (
        lambda m, x: x[:, m.order][:, m.order.argsort()],
        "slots are sorted",
    ),
    "numbers that are written over": (
        lambda m, x: x[:, m.order.remainder_(8)],
        "an order of channels that is read as numbers",
    ),
    "added to themselves backwards": (
        lambda m, x: x + x.flip(1),
        "to be kept like itself in another order",
    ),
    "apart in another order": (
        lambda m, x: torch.cat([x[:, m.order][:, :4] * 2, x[:, m.order][:, 4:]], 1),
        "taken apart in another order than its own",
    ),
    "some taken twice": (lambda m, x: x[:, m.order % 4].repeat(1, 1), "slots are addressed by number"),
    "rotated": (lambda m, x: x.roll(1, 1), "slots are rotated"),
}  # fmt: skip


@pytest.mark.parametrize(("middle", "why"), STAYS.values(), ids=list(STAYS))
def test_what_has_no_order_of_its_own_stays(middle: Forward, why: str) -> None:
    model = Reordered(middle)
    fixed = {str(each.parameter): each.reason for each in gp.analyze(model, INPUT).fixed}
    assert fixed["first.bias"].why == why
    assert "test_orders.py:" in fixed["first.bias"].source
    result = gp.slimmed(Deeper(middle), 0.5, INPUT, align=1)
    assert len(result.model.first.weight) == 8
    assert len(result.model.before[0].weight) == 5


class Deeper(Reordered):
    """Has layers that can be cut before those between which channels come in another order."""

    def __init__(self, middle: Forward) -> None:
        super().__init__(middle)
        self.before = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(x))


def in_code(m: Any, x: Tensor) -> Tensor:
    return x[:, [3, 0, 6, 2, 7, 1, 5, 4]]


def never_traced(m: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        raise NotImplementedError("no way to trace this")
    return in_code(m, x)


def by_values(m: Any, x: Tensor) -> Tensor:
    return x[:, list(range(8))[::-1]] if float(x.detach().sum()) > -1e9 else x


@pytest.mark.parametrize("middle", [never_traced, by_values])
@pytest.mark.filterwarnings("ignore:first.weight.0 stay whole")
def test_an_order_in_code_that_cannot_be_rewritten_leaves_its_channels_whole(
    middle: Forward,
) -> None:
    result = gp.slimmed(Deeper(middle), 0.5, INPUT, align=1)
    assert result.form == "module"
    assert len(result.model.first.weight) == 8
    assert len(result.model.before[0].weight) == 5


def test_a_slim_model_with_an_order_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Reordered(WAYS["there and back"][0])
    result = gp.slimmed(model, 0.5, INPUT, align=1)
    gp.save(result, tmp_path / "slim.safetensors")
    loaded = gp.load(tmp_path / "slim.safetensors", Reordered(model.middle))
    assert torch.equal(loaded(INPUT), result.model(INPUT))


def test_an_order_in_a_checkpoint_is_numbered_anew(tmp_path: Path) -> None:
    model = Reordered(WAYS["by a buffer"][0])
    save_model(model, str(tmp_path / "model.safetensors"))
    result = gp.slimmed(model, 0.5, INPUT, align=1)
    gp.shrink_checkpoint(model, result.plan, tmp_path, tmp_path / "slim", INPUT)
    loaded = gp.load(tmp_path / "slim", Reordered(model.middle))
    assert torch.equal(loaded(INPUT), result.model(INPUT))


def test_channels_in_a_new_order_come_in_their_old_one_where_they_are_read() -> None:
    model = Reordered(lambda m, x: x[:, m.order].flip(1) * x[:, m.order].tanh().flip(1))
    graph = gp.analyze(model, INPUT)
    orders = {group.axis: np.arange(group.size)[::-1].copy() for group in graph.groups}
    moved = reorder_slots(model, graph.inference, orders)
    assert not torch.equal(moved.first.weight, model.first.weight)
    assert torch.allclose(moved(INPUT), model(INPUT), atol=1e-6)
