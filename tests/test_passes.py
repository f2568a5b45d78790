"""Passes that keep what a model computes: batch norms folded, identities removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphprune.passes import AbsorbConstants, FoldBatchNorm, RemoveIdentities, SlimChannels
from torch import Tensor, fx, nn

import graphprune as gp

aten = torch.ops.aten


def settled(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics, scales and shifts that show."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2.0)
    return model.double().eval()


def calls(graph_module: fx.GraphModule, *packets: object) -> list[fx.Node]:
    return [
        n for n in graph_module.graph.nodes if getattr(n.target, "overloadpacket", 0) in packets
    ]


class Matrix(nn.Module):
    """A product with a parameter, which has no place for a bias, and a norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(6, 5)), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ self.weight).relu()


class NamedBias(nn.Module):
    """A module whose `bias` is something else than its layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.linear(x, self.weight)) * self.bias


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), (3, 9, 8)),
    "without_bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)),
        (3, 9, 8),
    ),
    "groups": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8)), (4, 9)),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)
        ),
        (4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (6,)),
    "without_scale": (
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False)),
        (6,),
    ),
    "matrix": (Matrix, (6,)),
    "a_bias_of_another_kind": (NamedBias, (6,)),
}

KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "statistics_of_the_batch": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False)),
        (6,),
    ),
    "along_another_dimension": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)),
        (5, 6),
    ),
    "no_layer_before_it": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)), (6,)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_batch_norm_becomes_part_of_its_layer(name: str) -> None:
    build, shape = FOLDED[name]
    torch.manual_seed(1)
    model, x = settled(build()), torch.randn(4, *shape).double()
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    folded, modified = FoldBatchNorm()(model, x)
    assert modified
    assert not calls(folded, aten.batch_norm)
    torch.testing.assert_close(folded(x), wanted, rtol=1e-12, atol=1e-12)
    assert not [key for key in folded.state_dict() if "running" in key or "tracked" in key]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    again, modified = FoldBatchNorm()(folded, x)
    assert not modified
    torch.testing.assert_close(again(x), folded(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", KEPT)
def test_a_batch_norm_that_cannot_be_folded_stays(name: str) -> None:
    build, shape = KEPT[name]
    model, x = settled(build()), torch.randn(4, *shape).double()
    folded, modified = FoldBatchNorm()(model, x)
    assert not modified
    assert calls(folded, aten.batch_norm)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_a_value_or_a_weight_that_something_else_reads_keeps_its_batch_norm() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.second, self.other = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y + self.norm(y) + self.other(self.second(x)) + self.second(y)

    model, x = settled(Both()), torch.randn(4, 6).double()
    folded, modified = FoldBatchNorm()(model, x)
    assert not modified
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_a_folded_network_is_smaller_and_can_be_cut() -> None:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)]
    model, x = settled(nn.Sequential(*layers)), torch.randn(2, 3, 9, 9).double()
    slim = gp.Pipeline([FoldBatchNorm(), SlimChannels(ratio=0.5, importance="l1")])(model, x)
    assert sorted(slim.state_dict()) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert slim.state_dict()["0.bias"].shape == (8,)


class Idle(nn.Module):
    """Dropout, copies that may go, and copies that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(self.first(x.clone())).clone().detach()
        return nn.functional.alpha_dropout(y, 0.5, self.training), x.clone()


def test_identities_go_but_for_copies_that_are_handed_out() -> None:
    model, x = Idle().eval(), torch.randn(4, 6)
    bare, modified = RemoveIdentities()(model, x)
    assert modified
    (copy,) = calls(bare, aten.clone)
    assert [node.op for node in copy.users] == ["output"]
    assert not calls(bare, aten.dropout, aten.alpha_dropout, aten.detach)
    for training in (False, True):
        bare.train(training)
        given, wanted = bare(x), model(x)
        assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert not RemoveIdentities()(bare, x)[1]


def test_copies_stay_where_something_is_written_over() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y.clone().mul_(2) + y

    model, x = Writing().eval(), torch.randn(4, 6)
    bare, modified = RemoveIdentities()(model, x)
    assert not modified
    torch.testing.assert_close(bare(x), model(x))


def test_a_copy_that_a_view_needs_stays() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            turned = self.first(x).transpose(1, 2).clone(memory_format=torch.contiguous_format)
            return turned.view(x.shape[0], -1)

    model, x = Turned().eval(), torch.randn(4, 3, 6)
    bare, _ = RemoveIdentities()(model, x)
    torch.testing.assert_close(bare(x), model(x))


class Arithmetic(nn.Module):
    """Layers with constants before and behind them, some of which can go into them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.last = nn.Linear(4, 5)
        self.matrix = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("mean", torch.randn(1, 3, 1, 1))
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first((x - self.mean) / 0.25) * self.scale + 0.5
        y = self.grouped(y * 2.0).sub(1.0).relu()
        y = 3.0 - self.up(y).div(2.0)
        y = self.last(y.mean((2, 3)) + 1.0) + self.offset
        return 2.0 * (y @ self.matrix)


def test_constants_beside_layers_become_part_of_them() -> None:
    torch.manual_seed(0)
    model, x = Arithmetic().double().eval(), torch.randn(2, 3, 9, 9).double()
    absorbed, modified = AbsorbConstants()(model, x)
    assert modified
    assert not calls(absorbed, aten.add, aten.sub, aten.mul, aten.div, aten.rsub)
    torch.testing.assert_close(absorbed(x), model(x), rtol=1e-11, atol=1e-11)
    assert not {"mean", "scale", "offset"} & absorbed.state_dict().keys()
    assert absorbed.state_dict()["first.bias"].shape == (8,)
    again, modified = AbsorbConstants()(absorbed, x)
    assert not modified
    torch.testing.assert_close(again(x), absorbed(x), rtol=0, atol=0)


class Kept(nn.Module):
    """Constants that cannot go into the layers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.Conv1d(3, 4, 3, padding=1)
        self.shared = nn.Linear(4, 4)
        self.register_buffer("places", torch.randn(7, 4))
        self.register_buffer("counts", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.padded(x + 1.0).transpose(1, 2)
        z = self.shared(y) * self.places
        w = self.shared(z) * 2.0
        return w + z.add_(3.0).float() * self.counts + 1.0 / self.shared(w)


def test_constants_that_a_layer_cannot_take_up_stay() -> None:
    torch.manual_seed(0)
    model, x = Kept().eval(), torch.randn(2, 3, 7)
    absorbed, modified = AbsorbConstants()(model, x)
    assert not modified
    torch.testing.assert_close(absorbed(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_weights_that_are_computed_are_computed_once(norm: str) -> None:
    torch.manual_seed(0)
    with_norm = getattr(nn.utils.parametrizations, norm)
    model = nn.Sequential(with_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 3))
    model, x = model.double().eval(), torch.randn(2, 3, 9, 9).double()
    absorbed, modified = AbsorbConstants()(model, x)
    assert modified
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} == absorbed.state_dict().keys()
    torch.testing.assert_close(absorbed(x), model(x), rtol=1e-12, atol=1e-12)
    slim = gp.slim(absorbed, 0.5, x)
    assert slim.state_dict()["0.weight"].shape == (8, 3, 3, 3)


def test_buffers_that_the_model_writes_to_are_no_constants() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
            self.register_buffer("shift", torch.zeros(5))
            self.register_buffer("scale", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.shift[1:].copy_(x.mean(0)[:4])
            self.scale[1:].copy_(x.amax(0)[:2])
            return self.last(self.first(x) + self.shift) * (self.scale * 2.0)

    torch.manual_seed(0)
    model, x = Writing().eval(), torch.randn(4, 6)
    absorbed, modified = AbsorbConstants()(model, x)
    assert not modified
    for other in (x, torch.randn(4, 6)):
        torch.testing.assert_close(absorbed(other), model(other))


class Numbered(nn.Module):
    """A scale that is computed from whole numbers, and a weight from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.arange(1, 6))
        self.weight, self.gain = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.gain).relu() * (self.numbers.half() / 7)


def test_what_is_computed_keeps_its_type_and_goes_on_being_trained() -> None:
    torch.manual_seed(0)
    model, x = Numbered().eval(), torch.randn(4, 6)
    absorbed, modified = AbsorbConstants()(model, x)
    assert modified
    torch.testing.assert_close(absorbed(x), model(x))
    types = {name: (p.dtype, p.requires_grad) for name, p in absorbed.named_parameters()}
    assert sorted(types.values(), key=str) == [(torch.float16, False), (torch.float32, True)]
