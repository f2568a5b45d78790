"""Repair of recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.selection.plan import Plan
from graphprune.utils.inputs import Inputs, call


class Recurrent(nn.Module):
    """A recurrent layer of any kind, and a layer that reads its states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(5, 8, **options)
        self.last = nn.Linear(8 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)[0])


KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "gru": (nn.GRU, {}),
    "gru_two_layers": (nn.GRU, {"num_layers": 2}),
    "gru_without_bias": (nn.GRU, {"bias": False}),
    "lstm": (nn.LSTM, {}),
    "lstm_both_directions": (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "lstm_batch_first": (nn.LSTM, {"batch_first": True}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def sequences(seed: int = 1, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(9, 11, 5, generator=generator) for _ in range(count)]


def doubled(model: Recurrent) -> tuple[Recurrent, Plan]:
    """Return the model with half of its units like the other half, and a plan without them."""
    with torch.no_grad():
        for name, parameter in model.layer.named_parameters():
            rows = parameter.unflatten(0, (-1, 8))
            rows[:, 4:] = rows[:, :4]
            if "hh" in name and parameter.dim() == 2:
                parameter *= 1.5
    groups = gp.analyze(model, sequences()[0]).groups
    return model, Plan(
        {group.name: [0, 1, 2, 3] for group in groups}, {group.name: 8 for group in groups}, {}
    )


def apart(slimmer: nn.Module, model: nn.Module) -> float:
    unseen = Inputs(sequences(seed=2)[0])
    wanted = call(model, unseen)
    return float((call(slimmer, unseen) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_that_others_double_are_repaired_without_loss(kind: str, form: Any) -> None:
    torch.manual_seed(0)
    base, options = KINDS[kind]
    model, plan = doubled(Recurrent(base, **options))
    data = sequences()
    asked = {"example_inputs": data[0], "plan": plan, "form": form}
    as_cut = gp.slim(model, **asked)
    result = gp.slimmed(model, **asked, data=data, compensate=True)
    assert apart(as_cut, model) > 0.01
    assert apart(result.model, model) < 1e-4
    assert result.compensation is not None
    names = [layer.weight for layer in result.compensation.layers]
    cells = [name for name, _ in model.layer.named_parameters() if name.startswith("weight_ih")]
    assert names == [*(f"layer.{name}" for name in cells), "last.weight"]


@pytest.mark.parametrize("method", ["least_squares", "constants"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_recurrent_layer_gets_worse(kind: str, method: Any) -> None:
    torch.manual_seed(0)
    base, options = KINDS[kind]
    model, data = Recurrent(base, **options), sequences()
    result = gp.slimmed(model, 0.5, data[0], data=data, compensate=method)
    assert result.compensation is not None
    assert all(layer.after <= layer.before for layer in result.compensation.layers)
    if method == "least_squares":
        assert sum(x.after for x in result.compensation.layers) < 0.7 * sum(
            x.before for x in result.compensation.layers
        )


@pytest.mark.filterwarnings("ignore:data will not be read")  # where nothing is repaired
def test_a_state_that_is_given_is_where_the_layer_starts() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.GRU(5, 8, batch_first=True)
            self.decoder = nn.GRU(5, 8, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.encoder(x)
            return self.last(self.decoder(x.flip(1), state)[0])

    torch.manual_seed(0)
    model, data = Decoder(), sequences()
    as_cut, repaired = (
        gp.slim(model, 0.5, data[0], data=data, compensate=asked) for asked in (False, True)
    )
    assert apart(repaired, model) < 0.5 * apart(as_cut, model)


class Twice(Recurrent):
    """Runs over its input in both directions with the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)[0] + self.layer(x.flip(0))[0])


@pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")
@pytest.mark.parametrize("build", [lambda: Twice(nn.GRU), lambda: nn.LSTM(5, 8, proj_size=3)])
def test_weights_used_twice_and_projections_are_left_as_they_are(build: Any) -> None:
    torch.manual_seed(0)
    model, data = build(), sequences()
    as_cut = gp.slimmed(model, 0.5, data[0])
    repaired = gp.slimmed(
        model, example_inputs=data[0], plan=as_cut.plan, data=data, compensate=True
    )
    for name, parameter in repaired.model.named_parameters():
        if "last" not in name:
            assert torch.equal(parameter, as_cut.model.get_parameter(name))
