"""Weights that become zero while a model trains: schedules, blocks, and going on after an interruption."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphprune.passes import SparseRecurrent
from torch import Tensor, nn

import graphprune as gp


class Tagger(nn.Module):
    """An embedding, a recurrent layer of two directions and a classifier at each step."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.recurrent: nn.RNNBase = kind(8, width, 2, batch_first=True, bidirectional=True)
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.recurrent(self.embedding(tokens))[0]))


def train(model: nn.Module, schedule: Any, steps: range, each: Any = lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in steps:
        torch.manual_seed(number)
        tokens = torch.randint(20, (4, 6))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        each()


def test_the_threshold_is_the_papers_on_an_example_worked_by_hand() -> None:
    model = nn.Linear(11, 1, bias=False)
    with torch.no_grad():
        model.weight[:] = torch.tensor([0.0, 1, 1.4, 2, -3, 3.3, 4, -4.7, 4.8, 5, 9])
    # Nine tenths of the absolute weights are no more than 5, and theta = 2 * 5 * 2 / (2 * 4 + 3 * 4) = 1.
    schedule = gp.GradualSparsity(model, start=2, ramp=6, end=10, every=2, slope_ratio=1.5)
    left = []
    for _ in range(12):
        schedule.step()
        left.append(sorted(model.weight[model.weight != 0].abs().tolist()))
    whole = pytest.approx([1, 1.4, 2, 3, 3.3, 4, 4.7, 4.8, 5, 9])
    assert left[0] == left[1] == left[2] == whole
    # at 4: 1 * (4 - 2 + 1) / 2 = 1.5
    assert left[3] == left[4] == pytest.approx([2, 3, 3.3, 4, 4.7, 4.8, 5, 9])
    # at 6: (1 * (6 - 2 + 1) + 1.5 * (6 - 6 + 1)) / 2 = 3.25
    assert left[5] == left[6] == pytest.approx([3.3, 4, 4.7, 4.8, 5, 9])
    # at 8: (1 * (6 - 2 + 1) + 1.5 * (8 - 6 + 1)) / 2 = 4.75, and then no more
    assert all(now == pytest.approx([4.8, 5, 9]) for now in left[7:])


def test_the_threshold_ends_at_the_quantile_of_the_reference() -> None:
    torch.manual_seed(0)
    model, dense = nn.Linear(200, 100), nn.Linear(200, 100)
    with torch.no_grad():
        dense.weight.mul_(3)
    schedule = gp.GradualSparsity(model, start=0, ramp=1000, end=10_001, every=10, reference=dense)
    schedule.steps = 10_000
    quantile = dense.weight.abs().flatten().quantile(0.9).item()
    assert schedule.threshold("weight") == pytest.approx(quantile, rel=0.01)


def test_layers_of_one_kind_have_one_threshold_unless_by_layer() -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    with torch.no_grad():
        model[1].weight.mul_(10)
    for by_layer in (False, True):
        schedule = gp.GradualSparsity(model, start=0, end=100, every=5, by_layer=by_layer)
        schedule.steps = 50
        first, second = schedule.threshold("0.weight"), schedule.threshold("1.weight")
        assert second == pytest.approx(first * (10 if by_layer else 1), rel=0.1)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [
    {"schedule": "threshold"},
    {"schedule": "cubic", "sparsity": 0.8},
    {"schedule": "cubic", "sparsity": 0.8, "block": (4, 4)},
    {"schedule": "hard", "sparsity": 0.8, "block": (12, 1)},
])  # fmt: skip
def test_what_is_gone_stays_gone(kind: Any, options: Any) -> None:
    torch.manual_seed(0)
    model = Tagger(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    schedule = gp.GradualSparsity(model, start=2, ramp=8, end=20, every=3, **options)
    kept: list[dict[str, Tensor]] = []

    def each() -> None:
        kept.append({name: mask.clone() for name, mask in schedule.masks.items()})
        for name, value in schedule.sparsities.items():
            assert value >= 0.99 * (1 - kept[-1][name].float().mean())

    train(model, schedule, range(24), each)
    for earlier, later in itertools.pairwise(kept):
        assert all((later[name] <= earlier[name]).all() for name in later)
    assert all(0.3 < value < 1 for value in schedule.sparsities.values())
    if options["schedule"] != "threshold":
        assert all(value == pytest.approx(0.8, abs=0.06) for value in schedule.sparsities.values())
    pruned = {name for name in before if "weight_" in name or name == "head.weight"}
    assert set(schedule.sparsities) == pruned
    assert all(model.state_dict()[name].all() for name in ("norm.weight", "embedding.weight"))
    if options["schedule"] == "hard":
        assert all(mask.all() for masks in kept[:19] for mask in masks.values())


def test_the_cubic_schedule_is_fast_at_first() -> None:
    model = nn.Linear(100, 100)
    schedule = gp.GradualSparsity(model, start=0, end=40, every=10, schedule="cubic", sparsity=0.9)
    found = {}
    for _ in range(45):
        schedule.step()
        found[schedule.steps] = schedule.sparsities["weight"]
    assert found[9] == 0
    for step in (10, 20, 30, 40):
        assert found[step] == pytest.approx(0.9 * (1 - (1 - step / 40) ** 3), abs=1e-4)
    assert found[45] == found[40]


def test_no_block_is_in_two_gates_and_blocks_at_the_ends_are_smaller() -> None:
    model = nn.GRU(7, 10)
    schedule = gp.GradualSparsity(
        model, start=0, end=2, every=1, schedule="hard", sparsity=0.5, block=(4, 3)
    )
    assert schedule.masks["weight_ih_l0"].shape == (3, 3, 3)
    assert schedule.masks["weight_hh_l0"].shape == (3, 3, 4)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(2):
        schedule.step()
    for name, mask in schedule.masks.items():
        for gate, down, across in itertools.product(*map(range, mask.shape)):
            rows = slice(10 * gate + 4 * down, 10 * gate + min(4 * down + 4, 10))
            columns = slice(3 * across, 3 * across + 3)
            now = model.get_parameter(name)[rows, columns]
            assert torch.equal(now, dense[name][rows, columns] * mask[gate, down, across])
        scores = [
            dense[name].unflatten(0, (3, 10))[g, 4 * d : 4 * d + 4, 3 * a : 3 * a + 3].abs().max()
            for g, d, a in itertools.product(*map(range, mask.shape))
        ]
        flat = mask.flatten().tolist()
        assert max(s for s, m in zip(scores, flat, strict=True) if not m) <= min(
            s for s, m in zip(scores, flat, strict=True) if m
        )


def test_the_lasso_of_blocks_is_the_sum_of_their_norms_and_empties_them() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(5, 6).double()
    schedule = gp.GradualSparsity(layer, start=0, end=9, block=(4, 4))
    expected = 0.0
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        for gate in weight.chunk(3):
            parts = (part for rows in gate.split(4) for part in rows.split(4, 1))
            expected += sum(4 * float(part.square().sum().sqrt()) for part in parts)
    assert schedule.lasso().item() == pytest.approx(expected)
    before = float(schedule.lasso())
    nn.init.zeros_(layer.weight_hh_l0)
    schedule.lasso().backward()
    assert all(bool(w.grad.isfinite().all()) for w in layer.parameters() if w.grad is not None)
    optimiser = torch.optim.SGD([layer.weight_ih_l0], lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        schedule.lasso().backward()
        optimiser.step()
    assert schedule.lasso() < 0.2 * before


def test_a_threshold_above_all_weights_leaves_some() -> None:
    model, reference = nn.Linear(100, 100), nn.Linear(100, 100)
    with torch.no_grad():
        reference.weight.mul_(100)
    schedule = gp.GradualSparsity(model, start=0, ramp=2, end=100, every=1, reference=reference)
    for _ in range(99):
        schedule.step()
    assert schedule.threshold("weight") > 1
    assert schedule.sparsities["weight"] == pytest.approx(0.99)


def test_cells_projections_and_tied_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(6, 6)
            self.projected = nn.LSTM(6, 8, proj_size=4)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    model = Odd()
    schedule = gp.GradualSparsity(model, start=0, end=4, every=1, schedule="cubic", block=(2, 2))
    names = {"cell.weight_ih", "cell.weight_hh", "first.weight"}
    names |= {f"projected.weight_{which}_l0" for which in ("ih", "hh", "hr")}
    assert set(schedule.masks) == names
    assert schedule.masks["projected.weight_hr_l0"].shape == (1, 2, 4)
    assert schedule.masks["projected.weight_hh_l0"].shape == (4, 4, 2)
    only = gp.GradualSparsity(model, start=0, end=4, include=["cell*"], exclude=["*_ih"])
    assert set(only.masks) == {"cell.weight_hh"}


@pytest.mark.parametrize("schedule_name", ["threshold", "cubic"])
def test_an_interrupted_training_goes_on_with_the_same_masks(schedule_name: Any) -> None:
    def fresh() -> tuple[nn.Module, gp.GradualSparsity]:
        torch.manual_seed(0)
        model = Tagger()
        options: dict[str, Any] = {"schedule": schedule_name, "block": (2, 2)}
        return model, gp.GradualSparsity(model, start=1, ramp=5, end=16, every=2, **options)

    whole, schedule = fresh()
    train(whole, schedule, range(18))
    first, before = fresh()
    train(first, before, range(7))
    torch.manual_seed(9)
    second = Tagger()
    again = gp.GradualSparsity(
        second, start=1, ramp=5, end=16, every=2, schedule=schedule_name, block=(2, 2)
    )
    second.load_state_dict(first.state_dict())
    again.load_state_dict(before.state_dict())
    train(second, again, range(7, 18))
    assert again.sparsities == schedule.sparsities
    assert all(torch.equal(mask, again.masks[name]) for name, mask in schedule.masks.items())
    assert all(map(torch.equal, whole.parameters(), second.parameters()))


@pytest.mark.parametrize("schedule_name", ["threshold", "cubic", "hard"])
def test_balanced_rows_of_blocks_keep_as_many_and_one_at_least(schedule_name: Any) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(12, 16)
    with torch.no_grad():
        layer.weight_hh_l0[:16] *= 10  # one gate far above the others
    schedule = gp.GradualSparsity(
        layer, start=0, end=8, every=1, schedule=schedule_name, sparsity=0.95, block=(4, 4),
        slope_ratio=9, balanced=True,
    )  # fmt: skip
    before = {name: mask.clone() for name, mask in schedule.masks.items()}
    for _ in range(8):
        schedule.step()
        for name, mask in schedule.masks.items():
            counts = mask.sum(2).flatten()
            assert counts.min() == counts.max() >= 1
            assert not (mask & ~before[name]).any()
        before = {name: mask.clone() for name, mask in schedule.masks.items()}
    assert all(mask.sum(2).max() == 1 for mask in schedule.masks.values())


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_trained_network_is_cut_at_once_by_the_same_scores(kind: Any) -> None:
    torch.manual_seed(0)
    model, tokens = Tagger(kind), torch.randint(20, (4, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph, changed = SparseRecurrent(sparsity=0.75, block=(4, 4))(model, tokens)
    assert changed
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    schedule = gp.GradualSparsity(
        model, start=0, end=2, every=1, schedule="hard", sparsity=0.75, block=(4, 4),
        include=["recurrent.*"], balanced=True,
    )  # fmt: skip
    for _ in range(2):
        schedule.step()
    torch.testing.assert_close(graph(tokens), model(tokens))
    for name, value in model.state_dict().items():
        assert torch.equal(graph.state_dict()[name], value)
    longer = torch.randint(20, (3, 9))
    torch.testing.assert_close(graph(longer), model(longer))
    with pytest.raises(gp.InvalidRequestError, match="sparsity=1 must be above 0 and below 1"):
        SparseRecurrent(sparsity=1)(model, tokens)
    assert not SparseRecurrent()(nn.Linear(4, 4), torch.ones(1, 4)).modified
