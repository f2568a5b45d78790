"""Training around a cut: distillation after it, a penalty before it, cutting in steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.data import sample, trained_network
from graphprune.demo.main import accuracy
from graphprune.inputs import Inputs, call


def regression() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    return model.eval(), list(torch.randn(256, 6).split(32))


def apart(first: nn.Module, second: nn.Module, data: list[Tensor]) -> float:
    x = Inputs(torch.cat(data))
    return float((call(first, x) - call(second, x)).square().mean())


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_slim_model_learns_from_the_original(optimiser: Any) -> None:
    model, data = regression()
    slimmer = gp.slim(model, 0.5, data[0])
    before = apart(slimmer, model, data)
    weights = copy.deepcopy(model.state_dict())
    means = gp.finetune(
        slimmer, model, data, epochs=10, learning_rate=0.02, optimiser=optimiser,
        distillation=gp.Distillation(temperature=None),
    )  # fmt: skip
    assert means[-1] < means[0]
    assert apart(slimmer, model, data) < 0.5 * before
    assert not slimmer.training
    assert not any(p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_tuning_is_the_same_for_the_same_seed() -> None:
    model, data = regression()
    slimmer = gp.slim(model, 0.5, data[0]).train()
    first, second, other = (copy.deepcopy(slimmer) for _ in range(3))
    for one, seed in ((first, 1), (second, 1), (other, 2)):
        torch.manual_seed(id(one) % 1000)
        gp.finetune(one, model, data, seed=seed)
        assert one.training
    same, different = (
        [torch.equal(a, b) for a, b in zip(first.parameters(), two.parameters(), strict=True)]
        for two in (second, other)
    )
    assert all(same)
    assert not any(different)


def test_labels_count_where_a_loss_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, labels = torch.randn(64, 4), torch.randint(3, (64,))

    def tuned(**options: Any) -> float:
        slimmer = copy.deepcopy(model)
        gp.finetune(slimmer, model, [(x, labels)] * 20, learning_rate=0.1, **options)
        return float(F.cross_entropy(slimmer(x), labels))

    assert tuned() == pytest.approx(float(F.cross_entropy(model(x), labels)), rel=0.01)
    both = tuned(loss=F.cross_entropy)
    alone = tuned(loss=F.cross_entropy, distillation=None)
    assert alone < both < tuned()


def test_the_distance_of_logits_is_a_divergence_of_softmaxes() -> None:
    torch.manual_seed(0)
    given, wanted = torch.randn(5, 3, 7).double(), torch.randn(5, 3, 7).double()
    p, q = (wanted / 2).softmax(-1), (given / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(gp.Distillation()({"logits": given}, {"logits": wanted}), expected)


def groups_of_two(strength: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network trained on something that two hidden units can say, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(512, 8)
    y = (x[:, :1].relu() - x[:, 1:2].relu()).detach()
    lasso = gp.GroupLasso(model, x[:2])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        loss = F.mse_loss(model(x), y) + strength * lasso()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, x, y


def test_a_penalty_empties_channels_so_that_cutting_them_costs_little() -> None:
    after = []
    for strength in (0.0, 1e-3):
        model, x, y = groups_of_two(strength)
        slimmer = gp.slim(model, 0.75, x[:2])
        after.append(float(F.mse_loss(slimmer(x), y)))
    assert after[1] < 0.2 * after[0]


def test_the_penalty_sums_the_norms_of_whole_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, bias=False))
    lasso = gp.GroupLasso(model, torch.randn(1, 2, 4, 4))
    first, norm, last = model
    squares = (
        first.weight.square().sum((1, 2, 3)) + first.bias.square() + norm.weight.square()
        + norm.bias.square() + last.weight.square().sum((0, 2, 3))
    )  # fmt: skip
    ((name, norms),) = lasso.norms().items()
    assert name == "0.weight:0"
    torch.testing.assert_close(norms, squares.sqrt())
    torch.testing.assert_close(lasso(), (squares.sqrt() * 7**0.5).sum())


def test_the_penalty_of_an_empty_channel_has_a_finite_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    gp.GroupLasso(model, torch.randn(1, 4))().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:asked to remove")  # of a step on the way
@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("options", [{}, {"of": "macs"}, {"compensate": True}])
def test_cutting_in_steps_ends_where_one_cut_does(form: Any, options: dict[str, Any]) -> None:
    model, images = trained_network(), sample("train").images[:128]
    if "compensate" in options:
        options = {**options, "data": images.split(64)}
    counts = [gp.count_parameters(model)]
    for slimmer in gp.slim_gradually(model, 0.5, images[:2], steps=4, form=form, **options):
        counts.append(gp.count_parameters(slimmer))
    at_once = gp.slim(model, 0.5, images[:2], form=form, **options)
    assert len(counts) == 5
    assert counts == sorted(counts, reverse=True)
    macs = [gp.count_macs(m, images[:2]) for m in (slimmer, at_once)]
    assert macs[0] == pytest.approx(macs[1], rel=0.03)


def test_training_between_the_steps_is_kept() -> None:
    model, images = trained_network(), sample("train").images[:256]
    test = sample("test")
    for slimmer in gp.slim_gradually(model, 0.5, images[:2], steps=2):
        gp.finetune(slimmer, model, images.split(64), epochs=6, learning_rate=5e-3)
    assert accuracy(slimmer, test) > 0.7
    at_once = gp.slim(model, 0.5, images[:2])
    assert accuracy(at_once, test) < 0.3
