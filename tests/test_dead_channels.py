"""Channels that change nothing are found, all of them and no others, and go without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphprune.passes import EliminateDeadChannels, FoldBatchNorm
from torch import Tensor, nn

import graphprune as gp
from graphprune.graph_utils.constant_inputs import POINTWISE, POOLING
from graphprune.groups.readers import readers_of
from graphprune.pipeline.pipeline import program_of
from graphprune.utils.inputs import call, output_tensors
from tests.models import example
from tests.structures import STRUCTURES
from tests.test_passes import settled

aten = torch.ops.aten


def zero(layer: nn.Module, *outputs: int, bias: float = 0.0) -> None:
    with torch.no_grad():
        layer.weight[list(outputs)] = 0.0
        layer.bias[list(outputs)] = bias


def unread(layer: nn.Module, *inputs: int) -> None:
    with torch.no_grad():
        layer.weight[:, list(inputs)] = 0.0


def network(padding: int = 0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 4),
    )  # fmt: skip


def zero_filters() -> nn.Module:
    model = settled(network(1))
    zero(model[4], 1, 3, bias=-0.5)
    zero(model[8], 2)
    return model


def batch_norms_cut_off() -> nn.Module:
    model = settled(network(1))
    with torch.no_grad():
        model[1].weight[[0, 5, 6]] = 0.0
        model[1].bias[[0, 5, 6]] = torch.tensor([-1.0, 0.0, -0.1]).double()
    return model


def constants_that_a_bias_takes() -> nn.Module:
    model = settled(network(0))
    with torch.no_grad():
        model[1].weight[[0, 5]] = 0.0
        model[1].bias[[0, 5]] = torch.tensor([0.7, 0.3]).double()
    zero(model[4], 2, bias=0.4)
    zero(model[8], 7, bias=2.0)
    return model


def unread_channels() -> nn.Module:
    model = settled(network(1))
    unread(model[4], 2, 7)
    unread(model[8], *range(4, 8))
    unread(model[10], 0, 9)
    return model


def one_behind_another() -> nn.Module:
    """What feeds only dead channels is found once those are gone."""
    model = settled(
        nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    )
    unread(model[4], 1)
    with torch.no_grad():
        model[2].weight[[0, 2, 3, 4], 3] = 0.0  # channel 3 feeds channel 1 alone
    return model


def without_a_bias() -> nn.Module:
    model = settled(
        nn.Sequential(
            nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
        )
    )
    zero(model[0], 0, 4)
    return model


class Branches(nn.Module):
    """A sum and a concatenation of what two layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 3), nn.Conv1d(3, 6, 3)
        self.third, self.last = nn.Conv1d(3, 4, 3), nn.Conv1d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = F.relu(self.first(x) + self.second(x))
        return self.last(torch.cat([both, self.third(x).tanh()], 1))


def branches() -> nn.Module:
    model = settled(Branches())
    zero(model.first, 0, 1, 2)
    zero(model.second, 1, 2, 3)  # 1 and 2 are zero in both
    unread(model.last, 9)
    return model


def separable() -> nn.Module:
    model = settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8, padding=1),
            nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1),
        )
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = (
            0.0,
            -1.0,
        )  # zero, and a constant behind the next norm
        model[4].weight[5], model[4].bias[5] = 0.0, 0.5
    return model


class Heads(nn.Module):
    """Attention of four heads, two of which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def heads() -> nn.Module:
    model = settled(Heads())
    unread(model.attention.out_proj, 2, 3, 6, 7)
    return model


# What torch.export does not trace.
NO_GRAPHS = {"control_flow", "grouped_experts", "lowest_numbers", "packed_sequences"}

# Networks, the shape of their input, and how many channels are dead in each of their groups.
PLANTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "zero_filters": (zero_filters, (3, 9, 8), [0, 2, 1]),
    "batch_norms_cut_off": (batch_norms_cut_off, (3, 9, 8), [3, 0, 0]),
    "constants_that_a_bias_takes": (constants_that_a_bias_takes, (3, 12, 10), [2, 1, 1]),
    "unread_channels": (unread_channels, (3, 9, 8), [2, 1, 2]),
    "one_behind_another": (one_behind_another, (4,), [1, 1]),
    "without_a_bias": (without_a_bias, (4,), [2, 0]),
    "branches": (branches, (3, 9), [2, 1]),
    "separable": (separable, (3, 6, 6), [2]),
    "heads": (heads, (5, 8), [2, 0]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_all_dead_channels_go_and_nothing_else(name: str) -> None:
    build, shape, planted = PLANTED[name]
    model = build()
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(batch, *shape, generator=generator).double() for batch in (2, 5))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = [
        group.size for group in gp.analyze(model, x).groups if group.exact and not group.inner
    ]
    bare, modified = EliminateDeadChannels()(model, x)
    after = [group.size for group in gp.analyze(bare, x).groups if group.exact and not group.inner]
    assert modified
    assert [a - b for a, b in zip(before, after, strict=True)] == planted
    for data in (x, other):
        torch.testing.assert_close(bare(data), model(data), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not EliminateDeadChannels()(bare, x)[1]


def test_a_constant_that_a_padded_convolution_reads_stays() -> None:
    model = settled(network(1))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 0.0, 0.7
    x = torch.randn(2, 3, 9, 8).double()
    bare, modified = EliminateDeadChannels()(model, x)
    assert not modified
    torch.testing.assert_close(bare(x), model(x), rtol=0, atol=0)


def test_a_group_keeps_a_channel() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    zero(model[0], *range(6), bias=0.25)
    x = torch.randn(2, 4).double()
    bare, _ = EliminateDeadChannels()(model, x)
    assert bare.state_dict()["0.weight"].shape == (1, 4)
    torch.testing.assert_close(bare(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:the graph gives what encoder gives in training")
@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - NO_GRAPHS))
def test_what_a_model_computes_stays(name: str) -> None:
    structure = STRUCTURES[name]
    model, inputs = structure.build().eval(), gp.Inputs.of(structure.inputs())
    whole = program_of(model, inputs).graph_module
    bare, _ = EliminateDeadChannels()(model, inputs)
    wanted, given = (list(output_tensors(call(each, inputs))) for each in (whole, bare))
    for (_, a), (_, b) in zip(wanted, given, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "bert", "t5"])
def test_a_channel_that_nothing_reads_goes_from_each_group(name: str) -> None:
    given = example(name)
    model = given.model.double()
    inputs = gp.Inputs.of(given.inputs).map(lambda t: t.double() if t.is_floating_point() else t)
    graph = gp.analyze(model, inputs)
    planted = set()
    with torch.no_grad():
        for group, readers in readers_of(graph).items():
            if readers and graph.by_name[group].exact and not graph.by_name[group].inner:
                planted.add(group)
                for reader in readers:
                    parameter = model.get_parameter(reader.parameter)
                    for slots in reader.slots(graph.by_name[group], parameter):
                        parameter[slots.reshape(parameter.shape) == 1] = 0.0
    whole = program_of(model, inputs).graph_module
    bare = gp.Pipeline([EliminateDeadChannels(), FoldBatchNorm()])(model, inputs)
    wanted, found = (list(output_tensors(call(each, inputs))) for each in (whole, bare))
    for (_, a), (_, b) in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10 * float(a.abs().max()))
    left = {group.name: group.size for group in gp.analyze(bare, inputs).groups}
    assert planted
    assert all(left[name] < graph.by_name[name].size for name in planted)


class Comparing(nn.Module):
    """A channel that depends on the input by way of a comparison, which hands no NaN on."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.how(self.first(x)))


def written(y: Tensor) -> Tensor:
    steps = torch.zeros_like(y)
    steps[:, :3] = (y[:, :3] > 0).to(y.dtype)
    return steps


@pytest.mark.parametrize(
    "how",
    [
        lambda y: torch.where(y > 0, torch.ones_like(y), torch.zeros_like(y)),
        lambda y: (y > 0).double(),
        lambda y: y.nan_to_num(),
        lambda y: y.sign(),
        lambda y: y.argsort(1).double(),
        written,
    ],
)
def test_what_depends_on_the_input_in_other_ways_is_alive(how: Callable[[Tensor], Tensor]) -> None:
    model, x = settled(Comparing(how)), torch.randn(16, 4).double()
    bare, modified = EliminateDeadChannels()(model, x)
    torch.testing.assert_close(bare(x), model(x), rtol=1e-12, atol=1e-12)
    assert not modified


def test_what_a_model_writes_to_its_buffers_is_no_constant() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("count", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1.0)
            return self.last(torch.tanh(self.first(x) + self.count))

    torch.manual_seed(0)
    model, x = settled(Counting()), torch.randn(2, 4).double()
    zero(model.first, 1, 2)
    bare, modified = EliminateDeadChannels()(torch.export.export(copy.deepcopy(model), (x,)))
    assert not modified
    for _ in range(3):
        torch.testing.assert_close(bare(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packet", POINTWISE, ids=str)
def test_pointwise_operators_hand_nan_on(packet: object) -> None:
    x = torch.full((3, 40), torch.nan)
    name = packet.__name__.rstrip("_")  # type: ignore[attr-defined]
    more = {"clamp": (0.0, 1.0), "clamp_min": (0.0,), "dropout": (0.5, False)}
    more |= dict.fromkeys(("feature_dropout", "alpha_dropout"), (0.5, False))
    more |= {name: (torch.zeros(3, 40),) for name in ("add", "sub", "mul", "div")}
    assert packet(x, *more.get(name, ())).isnan().all()  # type: ignore[operator]


@pytest.mark.parametrize("packet", POOLING, ids=str)
def test_pooling_hands_nan_on(packet: object) -> None:
    dimensions = int(packet.__name__[-2])  # type: ignore[attr-defined]
    x = torch.ones(1, 2, *[6] * dimensions)
    x[0, 0].flatten()[3] = torch.nan
    assert packet(x, [2] * dimensions)[0, 0].isnan().any()  # type: ignore[operator]
