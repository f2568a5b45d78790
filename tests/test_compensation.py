"""Repair without training: exact where exactness is possible, an improvement elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphprune.passes import Compensate
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.data import load_trained_network, sample
from graphprune.demo.main import accuracy
from graphprune.selection.plan import Plan
from graphprune.utils.inputs import Inputs, call

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")


class Residual(nn.Module):
    """Two branches with batch norms that meet in a sum, and a stream that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.main = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.side, self.side_norm = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.norm(self.main(x)) + self.side_norm(self.side(x))
        return self.head(x.relu().mean((2, 3)))


class Matrices(nn.Module):
    """Weights that lie inputs first, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(8, 7)), nn.Parameter(torch.randn(7))
        self.second = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.first).sigmoid() @ self.second


class Attention(nn.Module):
    """A transformer layer that normalises first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


image, vector, series = (3, 9, 8), (6,), (6, 11)

# Models, the shape of their input, and the layer half of whose channels double the other half.
REDUNDANT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        vector,
    ),
    "linear_without_bias": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)),
        vector,
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, 2, 1)
        ),
        image,
    ),
    "into_a_batch_norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.SiLU(),
        ),
        image,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 5, 3, 2, 1, output_padding=1)
        ),
        image,
    ),
    "one_dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, padding="same", dilation=2)
        ),
        series,
    ),
    "matrices": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Matrices()), vector),
    "pooled": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 4)
        ),
        image,
    ),
}


def lively(model: nn.Module) -> nn.Module:
    """Return the model in evaluation with weights and statistics at random."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def batches(shape: tuple[int, ...], count: int = 4, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, *shape, generator=generator) for _ in range(count)]


def doubled(model: nn.Sequential) -> tuple[nn.Sequential, Plan]:
    """Return the model with half of its first layer's channels like the other half, and a plan without."""
    half = 4
    with torch.no_grad():
        for module in model[:2]:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.dim() and len(tensor) == 2 * half:
                    tensor[half:] = tensor[:half]
    return model, Plan({"0.weight:0": list(range(half))}, {"0.weight:0": 2 * half}, {})


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", REDUNDANT)
def test_what_other_channels_say_too_is_repaired_without_loss(name: str, form: Any) -> None:
    build, shape = REDUNDANT[name]
    model, plan = doubled(lively(build()))
    data = batches(shape)
    slimmer = gp.slim(
        model, example_inputs=data[0], plan=plan, form=form, data=data, compensate=True
    )
    unseen = batches(shape, 1, seed=6)[0]
    as_cut = gp.slim(model, example_inputs=data[0], plan=plan)
    wanted = call(model, Inputs(unseen))
    scale = float(wanted.abs().max())
    assert float((call(as_cut, Inputs(unseen)) - wanted).abs().max()) > 0.05 * scale
    assert float((call(slimmer, Inputs(unseen)) - wanted).abs().max()) < 1e-3 * scale


@pytest.mark.parametrize("method", ["least_squares", "constants"])
@pytest.mark.parametrize(("build", "shape"), [(Residual, image), (Attention, (6, 12))])
def test_no_layer_gets_worse_on_the_data(build: Any, shape: Any, method: Any) -> None:
    model, data = lively(build()), batches(shape)
    result = gp.slimmed(
        model, 0.5, data[0], align=1, data=data, compensate=method, renormalised=True
    )
    assert result.compensation is not None
    layers = result.compensation.layers
    assert len(layers) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules()) + (
        build is Attention  # whose projections of queries, keys and values are one layer
    )
    assert all(layer.after <= layer.before for layer in layers)
    assert any(layer.after < 0.95 * layer.before for layer in layers)


def test_a_sum_is_what_is_aimed_at(monkeypatch: Any) -> None:
    model, data = lively(Residual()), batches(image)

    def error(slimmer: nn.Module) -> float:
        x = torch.cat(data)
        return float((call(slimmer, Inputs(x)) - call(model, Inputs(x))).square().mean())

    def repaired() -> nn.Module:
        return gp.slim(model, 0.5, data[0], align=1, data=data, compensate=True)

    with_sums = error(repaired())
    monkeypatch.setattr("graphprune.compensation.sites._may_move", lambda *_: False)
    assert with_sums < error(repaired())


def test_a_layer_that_is_broadcast_in_a_sum_aims_at_its_own_output() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)
            self.places = nn.Parameter(torch.randn(5, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.places + self.middle(self.first(x).relu())[:, None]).relu())

    model, data = lively(Broadcast()), batches(vector)
    result = gp.slimmed(model, 0.5, data[0], data=data, compensate=True)
    assert result.compensation is not None
    before, after = zip(*((x.before, x.after) for x in result.compensation.layers), strict=True)
    assert sum(after) < 0.9 * sum(before)


def test_a_batch_norm_along_another_dimension_is_no_part_of_the_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.last(self.first(x).relu()))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(64, 8, 6)
    result = gp.slimmed(model, 0.5, x, data=[x[:32], x[32:]], compensate=True)
    assert result.compensation is not None
    repaired = {layer.weight: layer for layer in result.compensation.layers}
    assert repaired["last.weight"].after < repaired["last.weight"].before
    assert torch.equal(result.model.norm.running_var, model.norm.running_var)


def test_batch_norm_says_the_same_in_training_after_a_repair() -> None:
    model, plan = doubled(lively(REDUNDANT["into_a_batch_norm"][0]()))
    data = batches(image, count=1)
    slimmer = gp.slim(model, example_inputs=data[0], plan=plan, data=data, compensate=True)
    in_evaluation = call(slimmer, Inputs(data[0]))
    torch.testing.assert_close(
        call(slimmer.train(), Inputs(data[0])), in_evaluation, rtol=0.01, atol=0.01
    )


def test_a_trained_network_is_repaired() -> None:
    test, images = sample("test"), sample("train").images[:256]
    model = load_trained_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    as_cut = gp.slim(model, 0.5, images[:2])
    repaired = gp.slim(model, 0.5, images[:2], data=images.split(128), compensate=True)
    assert accuracy(as_cut, test) < 0.3
    assert accuracy(repaired, test) > 0.82
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_with_two_readers_is_left_as_it_is() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(8, 3))
    data = batches(vector)
    result = gp.slimmed(model, 0.5, data[0], data=data, compensate=True)
    assert result.compensation is not None
    assert [layer.weight for layer in result.compensation.layers] == ["0.weight", "5.weight"]
    assert "0.weight: " in str(result.compensation)


def test_a_convolution_of_a_single_map_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(3, 12)
    with pytest.warns(gp.GraphPruneWarning, match="nothing is repaired"):
        gp.slim(model, 0.5, x, data=[x, x + 1], compensate=True)


def test_a_matrix_that_is_no_parameter_is_left_as_it_is() -> None:
    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(5, 3)
            self.register_buffer("basis", torch.randn(8, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu() @ self.basis)

    model, data = Transformed(), batches(vector)
    result = gp.slimmed(model, 0.5, data[0], data=data, compensate=True)
    assert result.compensation is not None
    assert "basis" not in [layer.weight for layer in result.compensation.layers]
    rows, columns = (result.plan.keep[name] for name in ("first.weight:0", "last.weight:1"))
    assert torch.equal(result.model.basis, model.basis[rows][:, columns])


def test_repair_does_not_depend_on_how_the_data_is_cut_into_batches() -> None:
    model, data = lively(REDUNDANT["convolution"][0]()), batches(image, count=2)
    together = [torch.cat(data)]
    errors = []
    for given in (data, together):
        slimmer = gp.slim(model, 0.5, data[0], data=given, compensate=True)
        errors.append(call(slimmer, Inputs(data[0])))
    torch.testing.assert_close(*errors, rtol=0.05, atol=0.05)


def test_the_repair_is_a_pass_like_any_other() -> None:
    model, data = lively(Residual()), batches(image)
    slim = gp.slimmed(model, 0.5, data[0], align=1, form="graph")
    repair = Compensate(model, slim.plan, data)
    graph_module, modified = repair(slim.model, data[0])
    at_once = gp.slim(
        model, example_inputs=data[0], plan=slim.plan, form="graph", data=data, compensate=True
    )
    assert modified
    assert repair.name() == "compensate"
    unseen = batches(image, count=1, seed=6)[0]
    torch.testing.assert_close(
        call(graph_module, Inputs(unseen)), call(at_once, Inputs(unseen)), rtol=1e-4, atol=1e-5
    )
    same, unchanged = Compensate(model, gp.Plan({}, {}), data)(model, data[0])
    assert not unchanged
    torch.testing.assert_close(call(same, Inputs(unseen)), call(model, Inputs(unseen)))


class Flattened(nn.Module):
    """Maps as vectors, the channel in front or behind."""

    def __init__(self, *, channels_last: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 7 * 6, 5)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x)
        return self.last((maps.movedim(1, -1) if self.channels_last else maps).flatten(1))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flattened(channels_last=False),
        lambda: Flattened(channels_last=True),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 5)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 5, 5)),
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 5, bias=False), nn.BatchNorm2d(5)
        ),
    ],
)
def test_few_samples_do_where_channels_follow_from_others(build: Any, monkeypatch: Any) -> None:
    model = lively(build())
    first, *_ = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    name = next(name for name, module in model.named_modules() if module is first)
    with torch.no_grad():
        mixture = torch.randn(4, 4)
        first.weight[4:] = torch.einsum("ok,kcij->ocij", mixture, first.weight[:4])
        first.bias[4:] = mixture @ first.bias[:4]
    plan = Plan({f"{name}.weight:0": [0, 1, 2, 3]}, {f"{name}.weight:0": 8}, {})
    data = [batch[:1] for batch in batches(image, count=2)]
    unseen = Inputs(batches(image, count=1, seed=6)[0])

    def error() -> float:
        slimmer = gp.slim(model, example_inputs=data[0], plan=plan, data=data, compensate=True)
        away = (call(slimmer, unseen) - call(model, unseen)).square().mean()
        return float(away / call(model, unseen).var())

    with_mixtures = error()
    monkeypatch.setattr("graphprune.compensation.compensate.Mixing.of", lambda *_: None)
    assert with_mixtures < 0.1
    assert with_mixtures < 0.2 * error()
