"""Criteria: each against what it claims to compute."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian

import graphprune as gp
from graphprune.calibration.batches import batches_of
from graphprune.demo.network import ResNet8
from graphprune.groups.groups import Group
from graphprune.importance import CRITERIA, ScoringContext, oracle, scores
from graphprune.importance.gated_loss import GatedLoss
from graphprune.importance.sensitivity_scan import _Kept
from graphprune.inference.infer import infer
from graphprune.layout import Axis
from graphprune.masks import Mask
from graphprune.selection.choose import choose
from graphprune.selection.request import Request
from graphprune.utils.inputs import Inputs, call, output_tensors
from graphprune.utils.torch_context import reference_kernels
from graphprune.verify import Run, silenced_outputs
from tests.structures import STRUCTURES

# Structures whose channels an operator mixes along the cut dimension before anything reads them, or
# whose weights are computed from others, so that gates on parameters do not silence them.
NOT_BY_GATES = {"cumsum_channels", "attention_linear", "spectral_norm", "weight_norm"}


class Perceptron(nn.Module):
    """Sigmoid units in two layers, as in the paper that the Taylor criteria come from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).sigmoid()).sigmoid())

    def with_gates(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        return self.last(second * self.second(first * self.first(x).sigmoid()).sigmoid())


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


@pytest.fixture
def model() -> Perceptron:
    torch.manual_seed(0)
    return Perceptron().double()


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(9, 5, generator=generator).double(), torch.randn(9, 3, generator=generator))
        for _ in range(3)
    ]


def scored(criterion: str, model: nn.Module, data: Any, loss: Any = squared) -> list[Any]:
    graph = gp.analyze(model, data[0][0])
    return list(scores(ScoringContext(model, graph, batches_of(data), loss), criterion).values())


def expected(
    of_batch: Callable[[Any, Tensor, Tensor], Any], model: Perceptron, data: Any
) -> list[Any]:
    """Return the mean over batches of a function of the loss over both layers' gates."""

    def one(x: Tensor, target: Tensor) -> Any:
        def loss(gates: tuple[Tensor, Tensor]) -> Tensor:
            return squared(model.with_gates(*gates, x), target)

        return of_batch(loss, torch.ones(7).double(), torch.ones(6).double())

    return [sum(parts) / len(data) for parts in zip(*(one(*batch) for batch in data), strict=True)]


def test_taylor_is_the_first_order_term_of_the_units_outputs(model: Perceptron, data: Any) -> None:
    def first(loss: Any, *ones: Tensor) -> list[Tensor]:
        return [-g for g in grad(loss)(ones)]

    for given, wanted in zip(
        scored("taylor", model, data), expected(first, model, data), strict=True
    ):
        np.testing.assert_allclose(given, wanted.detach().numpy(), rtol=1e-9)


def test_taylor2_has_the_exact_diagonal_of_the_hessian(model: Perceptron, data: Any) -> None:
    def second(loss: Any, *ones: Tensor) -> list[Tensor]:
        gradients, hessians = grad(loss)(ones), hessian(loss)(ones)
        return [hessians[i][i].diagonal() / 2 - gradients[i] for i in range(2)]

    for given, wanted in zip(
        scored("taylor2", model, data), expected(second, model, data), strict=True
    ):
        np.testing.assert_allclose(given, wanted.detach().numpy(), rtol=1e-6)


def test_the_oracle_is_the_loss_of_the_model_without_a_channel(
    model: Perceptron, data: Any
) -> None:
    graph = gp.analyze(model, data[0][0])
    found = scores(ScoringContext(model, graph, batches_of(data), squared), "oracle")
    for group in graph.groups:
        for slot in (0, group.size - 1):
            kept = {g.name: list(range(g.size)) for g in graph.groups}
            kept[group.name].remove(slot)
            plan = gp.Plan(kept, {g.name: g.size for g in graph.groups}, {})
            slimmer = gp.slim(model, example_inputs=data[0][0], plan=plan)
            changes = [
                float(squared(call(slimmer, Inputs(x)), t) - squared(call(model, Inputs(x)), t))
                for x, t in data
            ]
            assert found[group.name][slot] == pytest.approx(sum(changes) / len(data), rel=1e-9)


def test_fisher_is_half_the_mean_square_over_samples(model: Perceptron, data: Any) -> None:
    each = [
        [-s for s in scored("taylor", model, [(x[None], t[None])])]
        for x, t in zip(*data[0], strict=True)
    ]
    for given, of_samples in zip(
        scored("fisher", model, data[:1]), zip(*each, strict=True), strict=True
    ):
        np.testing.assert_allclose(given, np.square(of_samples).mean(0) / 2, rtol=1e-9)


def test_obs_charges_less_for_a_channel_that_another_can_replace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[1] = tensor[0]
        model[2].weight[:, 1] = model[2].weight[:, 0]
    data = [(torch.randn(64, 4).double(), torch.randn(64, 2).double())]
    fisher, obs = scored("fisher", model, data)[0], scored("obs", model, data)[0]
    assert obs[0] / fisher[0] < 0.1 * obs[2] / fisher[2]


def test_reconstruction_is_the_error_that_a_refit_leaves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(20000, 5).double()
    graph = gp.analyze(model, x)
    (found,) = scores(ScoringContext(model, graph, batches_of([x])), "reconstruction").values()
    with torch.no_grad():
        hidden, output = model[:2](x), model(x)
    features = torch.cat([hidden, torch.ones(20000, 1).double()], dim=1)
    square = output.square().sum()

    def left(without: list[int]) -> float:
        kept = features[:, [i for i in range(7) if i not in without]]
        fitted = torch.linalg.lstsq(kept, output).solution
        return float((kept @ fitted - output).square().sum() / square)

    gone: list[int] = []
    for channel in np.argsort(found)[:-1].tolist():
        others = [other for other in range(6) if other not in gone]
        least = min(left([*gone, other]) for other in others)
        assert left([*gone, channel]) == pytest.approx(least, rel=1e-6)
        before = left(gone)
        gone.append(channel)
        assert found[channel] == pytest.approx(left(gone) - before, rel=0.02, abs=1e-3)


class Weighed(nn.Module):
    """Two branches that are alike, one of which hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.second = copy.deepcopy(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).cos() + 0.1 * self.second(x).cos()


def test_reconstruction_weighs_layers_by_what_they_do_to_the_output() -> None:
    torch.manual_seed(0)
    model, x = Weighed().double(), torch.randn(400, 5).double()
    graph = gp.analyze(model, x)
    found = scores(ScoringContext(model, graph, batches_of(x.split(200))), "reconstruction")
    whole, tenth = (found[group.name] for group in graph.groups)
    np.testing.assert_allclose(tenth, whole / 100, rtol=1e-6)


class Answering(nn.Module):
    """Two outputs: a class, and numbers some of which are infinite."""

    def __init__(self, *, numbers: bool) -> None:
        super().__init__()
        self.first, self.second, self.numbers = nn.Linear(5, 6), nn.Linear(6, 4), numbers

    def forward(self, x: Tensor) -> Any:
        y = self.second(torch.tanh(self.first(x)))
        masked = y.masked_fill(torch.arange(4) == 2, -torch.inf)
        return (y.argmax(1), masked) if self.numbers else y.argmax(1)


@pytest.mark.parametrize("numbers", [True, False])
def test_reconstruction_ranks_where_outputs_are_no_numbers(numbers: bool) -> None:
    torch.manual_seed(0)
    model, x = Answering(numbers=numbers), torch.randn(64, 5)
    graph = gp.analyze(model, x)
    (found,) = scores(
        ScoringContext(model, graph, batches_of(x.split(32))), "reconstruction"
    ).values()
    assert np.isfinite(found).all()
    assert len(set(found)) == 6


def test_interpolative_is_a_pivoted_qr_decomposition_of_what_is_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(200, 5).double()
    graph = gp.analyze(model, x)
    (found,) = scores(ScoringContext(model, graph, batches_of([x])), "interpolative").values()
    left = model[:2](x).detach()
    total, order = left.square().sum(), []
    for _ in range(6):
        first = int(left.square().sum(0).argmax())
        assert found[first] == pytest.approx(float(left[:, first].square().sum() / total))
        order.append(first)
        along = left[:, first] / left[:, first].norm()
        left = left - torch.outer(along, along @ left)
    assert np.argsort(-found).tolist() == order


@pytest.mark.parametrize("criterion", ["reconstruction", "interpolative"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1)), (3, 9, 8)),
        (lambda: (nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, stride=2)), (3, 9, 8)),
        (lambda: (nn.Conv1d(5, 8, 3), nn.Conv1d(8, 4, 2)), (5, 12)),
    ],
)
def test_what_another_channel_says_goes_first(build: Any, shape: Any, criterion: str) -> None:
    torch.manual_seed(0)
    first, last = build()
    with torch.no_grad():
        first.weight[5], first.bias[5] = 3 * first.weight[4], 3 * first.bias[4]
    model, x = nn.Sequential(first, nn.ReLU(), last), torch.randn(16, *shape)
    graph = gp.analyze(model, x)
    found = scores(ScoringContext(model, graph, batches_of([x])), criterion)[graph.groups[0].name]
    assert int(np.argmin(found)) in (4, 5)


@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - NOT_BY_GATES))
def test_a_closed_gate_silences_its_channel(name: str) -> None:
    torch.manual_seed(0)
    structure = STRUCTURES[name]
    model, inputs = structure.build().eval(), Inputs.of(structure.inputs())
    graph = gp.DependencyGraph(infer(model, inputs, with_data=True))
    if not any(p.is_floating_point() for p in model.parameters()):
        return
    gated = GatedLoss(ScoringContext(model, graph, None, _squares))
    for group in (group for group in graph.groups if group.exact):
        slot = group.size // 2
        gates = gated.ones()
        gates[group.name][slot] = 0
        with reference_kernels():  # as the silenced model is run
            given = float(gated(gates, inputs, None))
        masks: dict[Axis, Mask] = {group.axis: np.arange(group.size) != slot}
        outputs = silenced_outputs(model, Run(inputs, graph.inference, masks))
        wanted = float(_squares([tensor for _, tensor in outputs], None))
        assert given == pytest.approx(wanted, rel=1e-4), group.name


def _squares(output: Any, _: Any) -> Tensor:
    tensors = (tensor for _, tensor in output_tensors(output) if tensor.is_floating_point())
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


@pytest.mark.filterwarnings("ignore:asked to remove 5% of macs, and 12.1% go, since")
def test_what_costs_more_goes_first_where_scores_are_losses() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.MaxPool2d(4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
    )
    graph = gp.analyze(model, torch.randn(1, 3, 8, 8))
    costly, cheap = graph.groups
    losses = {costly.name: np.full(8, 2.0), cheap.name: np.full(8, 1.0)}
    request = Request(0.05, of="macs", align=1)
    ranked, weighed = (
        choose(graph, lambda _: losses, request, losses=own).keep for own in (False, True)
    )
    assert len(ranked[cheap.name]) < 8 == len(ranked[costly.name])
    assert len(weighed[costly.name]) < 8 == len(weighed[cheap.name])


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 80), nn.Tanh(), nn.Linear(80, 20), nn.Tanh(),
        nn.Linear(20, 3),
    )  # fmt: skip


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_a_target_is_met_within_two_percent_or_the_reason_is_given(
    of: Any, ratio: float, ranking: Any
) -> None:
    model, x = chain(), torch.randn(2, 6)
    slimmer = gp.slim(model, ratio, x, of=of, ranking=ranking)
    count = gp.count_parameters if of == "parameters" else lambda m: gp.count_macs(m, x)
    assert ratio <= 1 - count(slimmer) / count(model) < ratio + 0.02


def test_a_uniform_ranking_takes_the_same_share_of_each_group() -> None:
    model, x = chain(), torch.randn(2, 6)
    slimmer = gp.slim(model, 0.75, x, of="macs", ranking="uniform")
    shares = [slimmer[i].out_features / model[i].out_features for i in (0, 2, 4)]
    assert max(shares) - min(shares) < 0.06


def test_channels_of_all_groups_compete_in_a_global_ranking() -> None:
    model, x = chain(), torch.randn(2, 6)
    graph = gp.analyze(model, x)
    given = {g.name: np.linspace(0, 1, g.size) ** (i + 1) for i, g in enumerate(graph.groups)}
    plan = gp.slimmed(model, 0.5, x, ranking="global", importance=lambda *_: given).plan
    relative = {name: values / values.mean() for name, values in given.items()}
    lowest = min(relative[name][kept].min() for name, kept in plan.keep.items())
    assert plan.removed == 70
    assert len({len(kept) / plan.sizes[name] for name, kept in plan.keep.items()}) == 3
    for name, kept in plan.keep.items():
        assert kept == np.flatnonzero(relative[name] >= lowest).tolist()


def test_what_is_left_is_scored_anew_after_each_step() -> None:
    """The first two units say the same: one of them is the cheapest to lose, both are the dearest."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[[0, 0, 1, 2]])
        model[1].weight.copy_(torch.eye(3)[[0, 0, 1, 2]].T * torch.tensor([1, 1, 1.5, 10]))
    x = torch.eye(3)
    asked = {"importance": "oracle", "data": [(x, model(x).detach())], "loss": squared}
    once, again = (
        gp.slimmed(model, 0.5, x, steps=steps, **asked).plan.keep["0.weight:0"] for steps in (1, 2)
    )
    assert once == [2, 3]
    assert again in ([0, 3], [1, 3])


def test_a_group_without_channels_has_no_scores() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    graph = gp.analyze(model, torch.randn(2, 5))
    graph.groups.append(Group("none", Axis(0), (), False))
    assert scores(ScoringContext(model, graph), "l2")["none"].shape == (0,)


def test_lamp_is_the_share_of_a_square_among_no_smaller_ones() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        model[1].weight.zero_()
    graph = gp.analyze(model, torch.randn(2, 1))
    (found,) = scores(ScoringContext(model, graph), "lamp").values()
    np.testing.assert_allclose(found, [1 / 14, 4 / 13, 1])


def test_bn_scale_is_the_weight_of_the_batch_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.0]))
    graph = gp.analyze(model, torch.randn(2, 3, 4, 4))
    first, second = scores(ScoringContext(model, graph), "bn_scale").values()
    np.testing.assert_allclose(first, [0.5, 2, 1, 0])
    assert np.isinf(second).all()


@pytest.mark.filterwarnings("ignore:(data|loss) will not be read")  # by all of them
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_chooses_alike_twice_and_leaves_the_model_alone(
    criterion: str, model: Perceptron, data: Any
) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    plans = [
        gp.slimmed(model, 0.5, data[0][0], importance=criterion, data=data, loss=squared).plan
        for _ in range(2)
    ]
    assert plans[0].keep == plans[1].keep
    assert plans[0].removed
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_criteria_work_where_parameters_are_frozen_shared_and_in_half_precision() -> None:
    torch.manual_seed(0)
    tied = nn.Linear(8, 8)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), tied, nn.ReLU(), tied, nn.Linear(8, 3)
    )
    model = model.bfloat16().requires_grad_(False)
    data = [(torch.randn(6, 4).bfloat16(), torch.randint(3, (6,)))]
    for criterion in ("taylor", "taylor2", "fisher", "oracle"):
        slimmer = gp.slim(
            model, 0.5, data[0][0], importance=criterion, data=data, loss=F.cross_entropy
        )
        assert slimmer[0].out_features == 4


def test_a_scan_is_the_loss_of_the_model_without_a_share_of_one_group(
    model: Perceptron, data: Any, tmp_path: Path
) -> None:
    scan = gp.sensitivity(model, data, squared, importance="l1", ratios=(0.3, 0.6))
    graph = gp.analyze(model, data[0][0])
    assert scan.losses.keys() == {group.name for group in graph.groups}
    for group in graph.groups:
        for ratio, loss in zip(scan.ratios, scan.losses[group.name], strict=True):
            gone = scan.order[group.name][: round(ratio * group.size)]
            kept = {group.name: [i for i in range(group.size) if i not in gone]}
            plan = gp.Plan(kept, {group.name: group.size}, {})
            slimmer = gp.slim(model, example_inputs=data[0][0], plan=plan)
            losses = [float(squared(call(slimmer, Inputs(x)), t)) for x, t in data]
            assert loss == pytest.approx(sum(losses) / len(data), rel=1e-9)
    assert f"{scan.intact:.4g}" in str(scan)
    scan.plot(tmp_path / "scan.svg")
    assert "second.weight:0" in (tmp_path / "scan.svg").read_text()


def test_a_scan_is_kept_and_goes_on_where_it_was_cut_off(
    model: Perceptron, data: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    cache = tmp_path / "scan.json"
    first = gp.sensitivity(model, data, squared, cache=cache)
    content = json.loads(cache.read_text())
    ((digest, losses),) = content["sensitivity"].items()
    del losses["first.weight:0"]
    cache.write_text(json.dumps(content))
    asked: list[str] = []
    measure = GatedLoss.__call__

    def counted(self: Any, gates: Any, *rest: Any) -> Tensor:
        asked.extend(name for name, gate in gates.items() if not gate.all())
        return measure(self, gates, *rest)

    monkeypatch.setattr(GatedLoss, "__call__", counted)
    monkeypatch.setattr("graphprune.importance.sensitivity_scan.for_each", _one_by_one)
    assert gp.sensitivity(model, data, squared, cache=cache) == first
    assert set(asked) == {"first.weight:0"}
    with torch.no_grad():
        model.last.weight[0, 0] += 1
    assert gp.sensitivity(model, data, squared, cache=cache).intact != first.intact
    assert len(json.loads(cache.read_text())["sensitivity"]) == 2
    assert digest in json.loads(cache.read_text())["sensitivity"]


def test_a_scan_of_a_network_with_batch_norms_is_kept(tmp_path: Path) -> None:
    model, images = ResNet8().eval(), torch.randn(4, 1, 28, 28)
    data = [(images, {"of": torch.randn(4, 10)})]

    def loss(output: Tensor, target: Any) -> Tensor:
        return (output - target["of"]).square().mean()

    scans = []
    for shift in (0.0, 0.0, 1.0):
        data[0][1]["of"] += shift
        scans.append(gp.sensitivity(model, data, loss, ratios=(0.5,), cache=tmp_path / "scan"))
    assert scans[0] == scans[1]
    assert scans[0].losses != scans[2].losses


def _one_by_one(function: Any, rows: Tensor) -> Tensor:
    return torch.stack([function(row) for row in rows])


def test_a_scan_chooses_how_much_goes_where(model: Perceptron, data: Any) -> None:
    with torch.no_grad():  # what the first layer says hardly matters to the second
        model.second.weight *= 0.01
    own = [(x, model(x).detach()) for x, _ in data]
    scan = gp.sensitivity(model, own, squared)
    plan = gp.slimmed(model, 6 / 13, data[0][0], importance=scan, ranking="global").plan
    assert [len(slots) for slots in plan.keep.values()] == [1, 6]


@pytest.mark.parametrize("criterion", ["taylor2", "fisher", "obs", "oracle"])
def test_a_model_that_asks_for_values_is_scored_one_by_one(criterion: str) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
            self.asks = True

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.first(x).tanh())
            return y if not self.asks or float(y.detach().abs().sum()) > -1 else x

    torch.manual_seed(0)
    model = Asks().double()
    data = [(torch.randn(6, 5).double(), torch.randn(6, 3).double())]
    asking = scored(criterion, model, data)[0]
    model.asks = False
    np.testing.assert_allclose(asking, scored(criterion, model, data)[0], rtol=1e-9)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_every_criterion_scores_the_units_of_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = kind(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x)[0])

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 5, 3).double()
    data = [(x, torch.randn(6, 5, 2).double())]
    exact = scored("oracle", model, data)[0]
    for slot in range(4):
        kept = {"layer.weight_ih_l0:0": [i for i in range(4) if i != slot]}
        plan = gp.Plan(kept, {"layer.weight_ih_l0:0": 4}, {})
        slimmer = gp.slim(model, example_inputs=x, plan=plan)
        change = squared(call(slimmer, Inputs(x)), data[0][1]) - squared(model(x), data[0][1])
        assert exact[slot] == pytest.approx(float(change), rel=1e-6)
    for criterion in ("taylor", "taylor2", "fisher", "obs"):
        assert np.isfinite(scored(criterion, model, data)[0]).all()


@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - NOT_BY_GATES)[::5])
def test_brute_force_behind_the_layers_alone_is_that_of_the_whole_model(
    name: str, monkeypatch: Any
) -> None:
    torch.manual_seed(0)
    structure = STRUCTURES[name]
    model, inputs = structure.build().eval(), Inputs.of(structure.inputs())
    graph = gp.DependencyGraph(infer(model, inputs, with_data=True))
    subject = ScoringContext(model, graph, batches_of([inputs]), _squares)
    if not any(p.is_floating_point() for p in model.parameters()):
        return
    with reference_kernels():
        fast = scores(subject, "oracle")
        monkeypatch.setattr("graphprune.importance.oracle._traced", lambda _: None)
        whole = scores(subject, "oracle")
    for group in graph.groups:
        scale = max(1e-3, float(np.abs(whole[group.name]).max(initial=0)))
        np.testing.assert_allclose(fast[group.name], whole[group.name], atol=1e-3 * scale)


@pytest.mark.parametrize(("build", "shape"), [(ResNet8, (4, 1, 28, 28)), (chain, (4, 6))])
def test_brute_force_runs_what_lies_behind_alone(build: Any, shape: Any) -> None:
    model, x = build(), torch.randn(shape)
    graph = gp.analyze(model, x)
    subject = ScoringContext(model.eval(), graph, batches_of([x]), _squares)
    graph_module = oracle._traced(subject)
    assert graph_module is not None
    assert oracle._readers(subject, graph_module).keys() == graph.by_name.keys()


def test_what_two_processes_scan_is_kept_of_both(tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    one, other = _Kept(path, "a scan"), _Kept(path, "a scan")
    another = _Kept(path, "another scan")
    one.add("first", [1.0])
    another.add("first", [2.0])
    other.add("second", [math.nan])
    assert _Kept(path, "a scan").losses.keys() == {"first", "second"}
    assert _Kept(path, "another scan").losses == {"first": [2.0]}
    assert {p.name for p in tmp_path.iterdir()} == {"scan.json", "scan.json.lock"}
