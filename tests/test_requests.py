"""What users ask for and pass in: patterns, options, data, losses; and that nothing of it goes unheard."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphprune.passes import SlimChannels
from torch import Tensor, nn

import graphprune as gp
from graphprune.groups.cost import mac_cost
from graphprune.importance import LOOK_AT_LOSS
from graphprune.selection.allocation import Changes
from graphprune.slimming import gradual
from graphprune.slimming.slim import Order, target_of

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def mlp(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4)).eval()


class Parts(nn.Module):
    """A backbone, a neck and a head, of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1))
        self.neck = nn.Conv2d(32, 48, 1)
        self.head = nn.Sequential(nn.Conv2d(48, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x)).relu())


IMAGE = torch.ones(1, 3, 4, 4)


def widths(model: nn.Module, **options: Any) -> list[int]:
    slimmer = gp.slim(model, 0.5, IMAGE, **options)
    return [layer.out_channels for layer in slimmer.modules() if isinstance(layer, nn.Conv2d)]


def said(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if issubclass(w.category, gp.GraphPruneWarning)]


# -------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize("pattern", ["head*", "head", "hea?", lambda model: model.head])
def test_a_module_is_named_by_a_glob_by_its_name_or_by_itself(pattern: Any) -> None:
    model = Parts()
    pattern = pattern(model) if callable(pattern) else pattern
    assert widths(model, exclude=[pattern]) == [16, 16, 48, 32, 4]
    assert widths(model, include=[pattern]) == [32, 32, 24, 16, 4]


def test_modules_of_the_first_model_are_meant_in_every_step() -> None:
    model = Parts()
    *_, last = gp.slim_gradually(model, 0.5, IMAGE, exclude=[model.head], steps=2)
    assert last.head[0].weight.shape[:2] == (32, 48)
    assert last.neck.weight.shape[:2] == (48, 16)


def test_a_pattern_fits_every_name_of_a_shared_tensor() -> None:
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)
    )
    model[4].weight = model[2].weight
    assert len(said(lambda: gp.slim(model, 0.5, X, exclude=["4.weight"]))) == 1  # nothing is cut


class Stream(nn.Module):
    """Layers that add to a stream, which is normalised before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("options", "speaks"),
    [
        ({"renormalised": True, "exclude": ["head*"]}, True),
        ({"include": ["blocks.0*"], "exclude": ["blocks.0.2*"], "renormalised": True}, True),
        ({"renormalised": True, "exclude": ["first*"]}, False),  # the group's own name
        ({"exclude": ["head*"]}, False),
        ({"exclude": ["blocks.0*"]}, False),
    ],
)
def test_a_group_is_not_taken_out_unheard_for_the_sake_of_one_member(
    options: dict[str, Any], speaks: bool
) -> None:
    heard = said(lambda: gp.slim(Stream(), 0.5, X, **options))
    assert any("first.weight:0" in text and "exclude=" in text for text in heard) == speaks


# ---------------------------------------------------------------------------- what nobody reads


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"data": [X]}, ["data"]),
        ({"data": [X], "loss": F.cross_entropy}, ["data", "loss"]),
        ({"data": [X], "compensate": True}, []),
        ({"data": [X], "importance": "reconstruction"}, []),
        ({"data": [(X, LABELS)], "loss": F.cross_entropy, "importance": "fisher"}, []),
        ({"seed": 3}, ["seed"]),
        ({"seed": 3, "importance": "random"}, []),
        ({"threads": 2}, ["threads"]),
        ({"align": "auto", "exclude": [], "seed": 0}, []),
    ],
)
def test_what_nothing_reads_is_said(options: dict[str, Any], unread: list[str]) -> None:
    for asked in (
        lambda: gp.slim(mlp(), 0.5, X, **options),
        lambda: SlimChannels(0.5, **{n: tuple(v) if v == [] else v for n, v in options.items()})(
            mlp(), X
        ),
    ):
        assert [text.partition(" will not be read")[0] for text in said(asked)] == unread


def test_a_ratio_that_was_given_is_told_from_the_default() -> None:
    plan = gp.slimmed(mlp(), 0.25, X).plan
    assert not said(lambda: gp.slim(mlp(), example_inputs=X, plan=plan))
    heard = said(lambda: gp.slim(mlp(), 0.5, X, plan=plan, importance="l1"))
    assert [text.partition(" will")[0] for text in heard] == ["ratio and importance"]
    assert gp.slimmed(mlp(), example_inputs=X).plan.request["ratio"] == 0.5


def test_numbers_of_numpy_are_numbers() -> None:
    plan = gp.slimmed(mlp(), np.float32(0.5), X, steps=np.int64(2), align=np.int64(4)).plan
    assert len(plan.keep["0.weight:0"]) == 8
    assert '"align": 4' in plan.to_json()


def test_steps_towards_a_latency_go_parts_of_the_way(monkeypatch: Any) -> None:
    targets = []

    def cut(order: Order, model: Any, inputs: Any, whole: Any = None) -> Any:
        targets.append(target_of(order, 10.0))
        return gp.slimmed(model, 0.0, inputs)

    monkeypatch.setattr(gradual, "run_slim", cut)
    list(gp.slim_gradually(mlp(), example_inputs=X, latency_ms=4.0, steps=3))
    assert targets == pytest.approx([8.0, 6.0, 4.0])
    targets.clear()
    list(gp.slim_gradually(mlp(), 0.6, X, of="latency", steps=3))
    assert targets == pytest.approx([8.0, 6.0, 4.0])


# ------------------------------------------------------------------------------- what is missed


def images_net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 2, 1))


@pytest.mark.parametrize(
    ("width", "ratio", "went"),
    [
        (64, 0.3, "25%"),
        (64, 0.9, "75%"),
        (8, 0.999, "50%"),
        (4, 0.999, "none"),
        (128, 0.6, "62.5%"),
        (64, 0.74, ""),
    ],
)
def test_a_ratio_of_channels_that_is_missed_is_said(width: int, ratio: float, went: str) -> None:
    heard = said(lambda: gp.slim(images_net(width), ratio, IMAGE))
    assert [f"and {went} go: of '0.weight:0'" in text for text in heard] == [True] * bool(went)
    assert all("align=1" in text for text in heard)
    assert not any(
        "align=1" in t for t in said(lambda: gp.slim(images_net(4), 0.6, IMAGE, align=1))
    )


def test_the_cost_of_one_axis_more_or_less_is_that_of_the_whole_cost() -> None:
    graph = gp.analyze(Parts(), IMAGE)
    cost, chance = mac_cost(graph.inference), np.random.default_rng(0)
    changes = Changes(cost, {group.axis: group.size for group in graph.groups})
    for _ in range(20):
        group = graph.groups[chance.integers(len(graph.groups))]
        changes.keep(group.axis, int(chance.integers(1, group.size)))
        assert changes.total == cost.total(changes.kept)


def test_the_time_to_choose_grows_with_the_groups_and_not_with_their_square(
    monkeypatch: Any,
) -> None:
    from graphprune.selection import allocation

    looks = 0
    plain = allocation._rest_of

    def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return plain(*arguments)

    monkeypatch.setattr(allocation, "_rest_of", counted)
    count = 30
    gp.slim(
        nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(count + 1)]),
        0.5,
        torch.ones(1, 4, 2, 2),
        align=2,
    )
    assert looks <= 2 * (count + 1)


# -------------------------------------------------------------------------------- data and losses


def scores(importance: str, data: Any, loss: Any = F.cross_entropy) -> Any:
    result = gp.slimmed(mlp(), 0.5, X, importance=importance, data=data, loss=loss)
    assert result.scores is not None
    return result.scores["0.weight:0"]


@pytest.mark.parametrize("importance", ["taylor", "taylor2", "taylor2_recursion", "oracle"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_count_alike_however_they_come_in_batches(importance: str, reduction: Any) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    at_once = scores(importance, [(X, LABELS)], loss)
    apart = scores(importance, [(X[:7], LABELS[:7]), (X[7:], LABELS[7:])], loss)
    np.testing.assert_allclose(
        at_once, apart * (2 if reduction == "sum" else 1), atol=1e-5 * abs(at_once).max()
    )


@pytest.mark.parametrize("importance", [name for name in LOOK_AT_LOSS if name != "oracle"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: (y.argmax(1) != t).float().mean(),
        lambda y, t: F.cross_entropy(y, t).detach(),
        torch.no_grad()(F.cross_entropy),
    ],
)
def test_a_loss_without_a_derivative_is_refused(importance: str, loss: Any) -> None:
    with pytest.raises(gp.InvalidRequestError, match="by a derivative"):
        scores(importance, [(X, LABELS)], loss)


@pytest.mark.parametrize("importance", [*LOOK_AT_LOSS, "reconstruction", "interpolative"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (X * torch.nan, "batch 1 of data gives NaN"),
        (X[:, :5], "does not run on batch 1 of data"),
        (X.double(), "does not run on batch 1 of data"),
        (X[:0], "batch 1 of data holds no samples"),
    ],
)
def test_a_bad_batch_is_named_by_its_number(importance: str, bad: Tensor, words: str) -> None:
    options = {"loss": F.cross_entropy} if importance in LOOK_AT_LOSS else {}
    data = [(X, LABELS), (bad, LABELS[: len(bad)])]
    with pytest.raises(gp.InvalidRequestError, match=words):
        gp.slim(mlp(), 0.5, X, importance=importance, data=data, **options)


@pytest.mark.parametrize("importance", LOOK_AT_LOSS)
def test_hooks_that_look_at_gradients_do_not_keep_a_criterion_from_them(importance: str) -> None:
    model, calls = mlp(), []
    hooks = [
        model[2].register_full_backward_hook(lambda *_: calls.append(1)),
        model[0].register_full_backward_pre_hook(lambda *_: calls.append(1)),
    ]
    options: Any = {"importance": importance, "data": [(X, LABELS)], "loss": F.cross_entropy}
    with torch.autograd.graph.save_on_cpu():
        hooked = gp.slimmed(model, 0.5, X, **options).scores
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    plain = gp.slimmed(mlp(), 0.5, X, **options).scores
    np.testing.assert_array_equal(hooked["0.weight:0"], plain["0.weight:0"])
    assert not calls
    assert all(
        hook.id in (*model[2]._backward_hooks, *model[0]._backward_pre_hooks) for hook in hooks
    )


class Complex(nn.Module):
    """Complex layers, and a real output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(*s, dtype=torch.cfloat) for s in ((6, 16), (16, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.to(torch.cfloat)).tanh()).abs()


def test_complex_channels_are_scored_by_their_loss() -> None:
    torch.manual_seed(0)
    model = Complex()

    def found(importance: str) -> Any:
        options: Any = {"data": [(X, LABELS)], "loss": F.cross_entropy}
        return gp.slimmed(model, 0.5, X, importance=importance, **options).scores["first.weight:0"]

    by_hand = []
    for channel in range(16):
        without = copy.deepcopy(model)
        without.last.weight.data[:, channel] = 0
        by_hand.append(
            float(F.cross_entropy(without(X), LABELS) - F.cross_entropy(model(X), LABELS))
        )
    np.testing.assert_allclose(found("oracle"), by_hand, atol=1e-5)
    assert np.corrcoef(found("taylor2"), by_hand)[0, 1] > 0.9


# ----------------------------------------------------------------------------- repair and training


def test_a_batch_that_a_repair_cannot_be_fitted_to_is_named() -> None:
    for bad in (X * torch.nan, X * torch.inf, X * 1e30):
        with pytest.raises(gp.InvalidRequestError, match=r"batch 1 of data gives .* is fitted"):
            gp.slim(mlp(), 0.5, X, data=[X, bad], compensate=True)


def test_a_repair_says_what_became_of_the_output() -> None:
    found = gp.slimmed(mlp(), 0.5, X, data=[X, X + 1], compensate=True).compensation
    assert found is not None
    assert found.output is not None
    assert found.output[1] < 0.5 * found.output[0]
    assert "error of the model's output" in str(found)


def test_a_repair_that_does_harm_is_said(monkeypatch: Any) -> None:
    from graphprune.compensation import compensate

    monkeypatch.setattr(
        compensate._Repair, "repair_layer", _spoilt(compensate._Repair.repair_layer)
    )
    heard = said(lambda: gp.slim(mlp(), 0.5, X, data=[X, X + 1], compensate=True))
    assert ["more harm than good" in text for text in heard] == [True]


def _spoilt(repaired: Any) -> Any:
    def wrong(self: Any, site: Any, *rest: Any) -> Any:
        result = repaired(self, site, *rest)
        self.given.get_parameter(result.weight).mul_(10)
        return result

    return wrong


def test_half_precision_is_repaired_too() -> None:
    model, x = mlp().half(), 100 * X.half()
    found = gp.slimmed(model, 0.5, x, data=[x, x / 2], compensate=True).compensation
    assert found is not None
    assert found.layers[-1].after < 0.1 * found.layers[-1].before


def test_a_batch_without_a_finite_loss_ends_training_before_it() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    once, twice = (gp.slim(model, 0.5, X) for _ in range(2))
    with pytest.raises(gp.InvalidRequestError, match="batch 1 of data in epoch 1"):
        gp.finetune(twice, model, [X, X * torch.nan, X], optimiser="sgd", seed=1)
    assert all(value.isfinite().all() for value in twice.state_dict().values())
    assert not torch.equal(twice[0].weight, once[0].weight)  # the first batch did its part
    assert twice[1].num_batches_tracked == 1


def test_exchanged_models_are_not_trained() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    slimmer = gp.slim(model, 0.5, X)
    with pytest.raises(gp.InvalidRequestError, match="exchanged"):
        gp.finetune(model, slimmer, [X])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gp.finetune(slimmer, model, [X])


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.CrossEntropyLoss(reduction="none")])
def test_a_loss_that_is_none_is_refused_in_training_too(loss: Any) -> None:
    slimmer = gp.slim(mlp(), 0.5, X)
    with pytest.raises(gp.InvalidRequestError, match="loss"):
        gp.finetune(slimmer, mlp(), [(X, LABELS)], loss=loss)


def test_weights_that_are_no_numbers_are_named() -> None:
    model = mlp()
    model[2].weight.data[0, 0] = torch.nan
    for options in ({}, {"form": "graph"}, {"importance": "reconstruction", "data": [X]}):
        with pytest.raises(gp.InvalidRequestError, match=r"NaN in 2\.weight"):
            gp.slim(model, 0.5, X, **options)  # type: ignore[arg-type]
