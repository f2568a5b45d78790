"""Training around a cut: distillation after it, a penalty before it, cutting in steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.data import load_trained_network, sample
from graphprune.demo.main import accuracy
from graphprune.shrink.tensors import slice_tensor
from graphprune.utils.inputs import Inputs, call


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
    model, images = load_trained_network(), sample("train").images[:128]
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
    model, images = load_trained_network(), sample("train").images[:256]
    test = sample("test")
    for slimmer in gp.slim_gradually(model, 0.5, images[:2], steps=2):
        gp.finetune(slimmer, model, images.split(64), epochs=6, learning_rate=5e-3)
    assert accuracy(slimmer, test) > 0.7
    at_once = gp.slim(model, 0.5, images[:2])
    assert accuracy(at_once, test) < 0.3


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}


def image_network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 8),
        nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip
    return model.double().eval(), torch.randn(8, 3, 6, 6).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_that_of_the_silenced_original(name: str) -> None:
    model, x = image_network()
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.02},
        {"params": [p for layer in model[1:] for p in layer.parameters()]},
    ]
    optimizer = OPTIMIZERS[name](groups)
    for _ in range(3):
        step(model, optimizer, x)
    result = gp.slimmed(model, 0.5, x)
    new = gp.carry_optimizer(optimizer, model, result)
    assert type(new) is type(optimizer)
    assert [group["lr"] for group in new.param_groups] == [0.02, optimizer.param_groups[1]["lr"]]
    silence(model, result)
    step(model, optimizer, x)
    step(result.model, new, x)
    masks, layouts = result.plan.masks(result.graph), result.graph.inference.parameters
    for key, parameter in model.named_parameters():
        small = slice_tensor(parameter, layouts[key], masks)
        wanted = parameter if small is None else small
        torch.testing.assert_close(result.model.get_parameter(key), wanted, rtol=0, atol=1e-12)


def silence(model: nn.Module, result: gp.Slimmed) -> None:
    """Set what reads the removed channels to zero."""
    gone = {
        name: [slot for slot in range(result.plan.sizes[name]) if slot not in kept]
        for name, kept in result.plan.keep.items()
    }
    with torch.no_grad():
        model[4].weight.view(8, 16, 16)[:, gone["0.weight:0"]] = 0.0
        model[6].weight[:, gone["4.weight:0"]] = 0.0


def test_the_average_of_weights_is_cut_by_the_same_plan() -> None:
    model, x = image_network()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model[0].weight += 1.0
    average.update_parameters(model)
    result = gp.slimmed(model, 0.5, x)
    small = gp.slim(average.module, example_inputs=x, plan=result.plan)
    kept = result.plan.keep["0.weight:0"]
    assert torch.equal(small[0].weight, average.module[0].weight[kept])


def test_an_optimizer_that_was_not_stepped_and_one_in_graph_form() -> None:
    model, x = image_network()
    optimizer = torch.optim.AdamW(model.parameters())
    result = gp.slimmed(model, 0.5, x, form="graph")
    new = gp.carry_optimizer(optimizer, model, result)
    step(result.model, new, x)
    assert len(new.state) == len(list(result.model.parameters()))
