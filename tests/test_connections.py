"""Sparse connections: which are on, what keeps the others off, how they change, and narrower networks."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphprune.passes import SparseConnections
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.network import ResNet8
from graphprune.sparsity.connections import Connectivity, choose_connectivity, masks_of
from graphprune.sparsity.connections.clustering import cluster_filters
from graphprune.sparsity.connections.patterns import PATTERNS, blocks_of, fan_in
from graphprune.sparsity.connections.sites import sites_of
from tests import models

X = torch.randn(2, 1, 28, 28)


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.randomise(ResNet8(), X).eval()


def chain(*widths: int, window: int = 3) -> nn.Module:
    """A plain network of convolutions, from three channels to ten classes."""
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise([3, *widths]):
        layers += [nn.Conv2d(before, width, window, padding=window // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


# ------------------------------------------------------------------------------------ patterns


@given(
    pattern=st.sampled_from(sorted(PATTERNS)),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40),
    fraction=st.floats(0.01, 1),
    share=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_fan_in_is_exact_and_every_channel_is_read_where_there_are_connections_enough(
    pattern: str, outputs: int, inputs: int, fraction: float, share: int, seed: int
) -> None:
    count = fan_in(fraction, inputs)
    assert count == max(1, math.ceil(fraction * inputs - 1e-9))
    sizes = np.bincount(blocks_of(outputs, inputs, count, share))
    blocks = len(sizes)
    assert sizes.sum() == outputs
    assert 1 <= sizes.max() <= min(share, sizes.min() + 1)
    read = np.ones(blocks, dtype=bool)
    order = PATTERNS[pattern](blocks, inputs, count, read, np.random.default_rng(seed))
    assert (np.sort(order, axis=1) == np.arange(inputs)).all()
    readers = np.bincount(order[:, :count].flatten(), minlength=inputs)
    if outputs * count >= inputs:
        assert blocks * count >= inputs
        assert readers.min() >= 1
    else:
        assert readers.max() <= 1
    if pattern == "expander":
        assert readers.max() - readers.min() <= 2


@given(
    fraction=st.floats(0.02, 1),
    share=st.sampled_from([1, 4, 32]),
    pattern=st.sampled_from(["random", "expander", "magnitude"]),
    widths=st.lists(st.integers(8, 24), min_size=2, max_size=4),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_every_connection_has_a_way_from_the_input_to_the_output(
    fraction: float, share: int, pattern: Any, widths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    model = chain(*widths)
    sparse = gp.connect_sparsely(
        model, fraction, torch.randn(1, 3, 8, 8), pattern=pattern, share=share, seed=seed
    )
    masks = [mask.connections for mask in masks_of(sparse).values()]
    assert len(masks) == len(widths) - 1
    reached = np.ones(masks[0].shape[1], dtype=bool)
    for on, following in itertools.zip_longest(masks, masks[1:]):
        live = on.any(1)
        assert set(on.sum(1)) <= {0, fan_in(fraction, on.shape[1])}
        assert not on[:, ~reached].any()
        read = np.ones(len(on), dtype=bool) if following is None else following.any(0)
        assert (live == read).all()
        reached = live


def test_a_channel_of_a_residual_stream_is_read_by_what_comes_later_alone() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x + self.c(F.relu(self.b(x)))
            return self.d(x)

    graph = gp.analyze(Stream(), torch.randn(1, 3, 4, 4))
    sites = sites_of(graph)
    assert [site.weight for site in sites] == ["b.weight", "c.weight"]
    turns = {site.weight: np.tile(np.arange(8), (8, 1)) for site in sites}
    on = Connectivity(graph, sites, turns).connections(0.25)
    assert (on["c.weight"].sum(1) == 2).all()  # the last convolution reads the whole stream
    assert on["b.weight"].sum(1).tolist() == [2, 2, 0, 0, 0, 0, 0, 0]


def neutral(model: nn.Module) -> nn.Module:
    """Return a model in which everything that is read has a positive derivative."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.abs_().div_(parameter[0].numel() ** 0.5)
            else:
                parameter.fill_(1)
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.zero_()
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.fill_(float(name.endswith("var")))
    return model


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "unet", "mobilenet_v2"])
@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_filters_have_connections_where_a_derivative_reaches_them(
    name: str, fraction: float
) -> None:
    example = models.ALL[name](small=True)
    model = neutral(gp.connect_sparsely(example.model.eval(), fraction, example.inputs, share=1))
    outputs: dict[str, Tensor] = {}
    for weight in masks_of(model):

        def note(_: Any, __: Any, output: Tensor, weight: str = weight) -> None:
            output.retain_grad()
            outputs[weight] = output

        model.get_submodule(weight.rpartition(".")[0]).register_forward_hook(note)
    model(*gp.Inputs.of(example.inputs).map(lambda t: t.double().abs()).args).sum().backward()
    for weight, mask in masks_of(model).items():
        reached = outputs[weight].grad.abs().flatten(2).sum((0, 2)) > 0
        assert reached.tolist() == mask.connections.any(1).tolist()


@pytest.mark.parametrize("share", [1, 8, 32])
def test_more_connections_leave_on_what_was_on(share: int) -> None:
    model = resnet()
    wiring = choose_connectivity(model, gp.analyze(model, X), 0.05, share=share)
    steps = [wiring.connections(fraction) for fraction in (0.05, 0.1, 0.3, 1.0)]
    for before, after in itertools.pairwise(steps):
        assert all((before[name] <= after[name]).all() for name in before)
    assert all(on.all() for on in steps[-1].values())


def test_blocks_share_their_channels() -> None:
    sparse = gp.connect_sparsely(chain(64, 128, 128), 0.25, torch.randn(1, 3, 8, 8), share=32)
    wide = masks_of(sparse)["4.weight"].connections
    assert len(np.unique(wide, axis=0)) == 4
    assert (wide.reshape(4, 32, 128) == wide.reshape(4, 32, 128)[:, :1]).all()


def test_chance_is_that_of_the_seed() -> None:
    model = chain(16, 16, 16)
    first, again, other = (
        masks_of(gp.connect_sparsely(model, 0.3, torch.randn(1, 3, 8, 8), seed=s, share=1))
        for s in (0, 0, 1)
    )
    same = [np.array_equal(first[n].connections, again[n].connections) for n in first]
    assert all(same)
    assert not np.array_equal(first["2.weight"].connections, other["2.weight"].connections)
    assert not np.array_equal(first["2.weight"].connections, first["4.weight"].connections)


def test_filters_that_want_the_same_channels_come_together() -> None:
    chance = np.random.default_rng(0)
    block_of = chance.permutation(np.repeat(np.arange(4), 8))
    wanted = np.array([chance.permutation(32)[:8] for _ in range(4)])
    saliency = chance.random((32, 32)) * 0.1
    for row, block in enumerate(block_of):
        saliency[row, wanted[block]] += 1
    found, order = cluster_filters(saliency, np.repeat(np.arange(4), 8), 8, chance)
    for block in range(4):
        (mine,) = set(block_of[found == block])
        assert set(order[block, :8]) == set(wanted[mine])


def test_clustering_keeps_more_than_consecutive_blocks_and_no_more_than_single_filters() -> None:
    saliency = np.random.default_rng(1).random((32, 64)) ** 4
    kept = []
    for size in (8, 1):
        start = np.arange(32) // size
        block_of, order = cluster_filters(saliency, start, 16, np.random.default_rng(0))
        assert (np.bincount(block_of) == size).all()
        kept.append(np.take_along_axis(saliency, order[block_of][:, :16], 1).sum())
    consecutive = saliency.reshape(4, 8, 64).sum(1)
    assert np.sort(consecutive, axis=1)[:, -16:].sum() < kept[0] < kept[1]


def test_taylor_finds_the_connections_that_matter_to_the_loss() -> None:
    torch.manual_seed(0)
    model = chain(8, 8, window=1)
    with torch.no_grad():
        model[2].weight[:, 3:] *= 100  # large, but of channels that are never active
        model[0].bias[3:] = -1e3
    data = [(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3]))]
    options = {"fraction": 3 / 8, "example_inputs": data[0][0], "share": 1}
    taylor = gp.connect_sparsely(
        model, **options, pattern="taylor", data=data, loss=F.cross_entropy
    )
    magnitude = gp.connect_sparsely(model, **options, pattern="magnitude")
    assert masks_of(taylor)["2.weight"].connections[:, :3].all(1).any()
    assert not masks_of(magnitude)["2.weight"].connections[:, :3].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_has_no_connections_to_spare_is_left_and_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.grouped = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, groups=4)
            self.back, self.few = nn.ConvTranspose2d(16, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.few(self.back(self.grouped(self.first(x))))

    x = torch.randn(1, 16, 4, 4)
    with pytest.warns(gp.GraphPruneWarning, match="none of the model's 4 convolutions has conn"):
        left = gp.connect_sparsely(Odd(), 0.5, x)
    assert not masks_of(left)
    assert list(masks_of(gp.connect_sparsely(Odd(), 0.5, x, first=True))) == ["first.weight"]


# ----------------------------------------------------------------------------------- training


def trained(model: nn.Module, steps: int, after_step: Any = lambda: None) -> list[float]:
    torch.manual_seed(0)
    images, labels = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: ~mask.mask.expand_as(model.get_parameter(original))
        for name, mask in masks_of(model).items()
        for original in [f"{name.removesuffix('weight')}parametrizations.weight.original"]
    }


def test_what_is_off_stays_off_and_the_state_is_clean_in_the_end(tmp_path: Any) -> None:
    dense = resnet()
    before = copy.deepcopy(dense.state_dict())
    sparse = gp.connect_sparsely(dense, 0.25, X, share=1)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    zeros = zeros_of(sparse)
    sparse.train()
    losses = trained(sparse, 8)
    assert losses[-1] < losses[0]
    resumed = gp.connect_sparsely(dense, 0.25, X, share=1, seed=5)
    resumed.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(resumed.eval()(X), sparse.eval()(X))

    done = gp.make_permanent(sparse)
    assert done is sparse
    assert done.state_dict().keys() == before.keys()
    assert all((done.get_parameter(name)[off] == 0).all() for name, off in zeros.items())
    fresh = ResNet8().eval()
    fresh.load_state_dict(done.state_dict())
    torch.testing.assert_close(fresh(X), resumed(X))


def test_the_pass_and_the_module_have_the_same_connections() -> None:
    model = resnet()
    graph, changed = SparseConnections(fraction=0.25, share=8, seed=3)(model, X)
    assert changed
    module = gp.connect_sparsely(model, 0.25, X, share=8, seed=3)
    torch.testing.assert_close(graph(X), module(X))
    assert "stage1.conv1.weight" in graph.state_dict()
    zeros = zeros_of(module)
    graph.train()
    trained(graph, 3)
    again = gp.Pipeline.parse("absorb-constants")(graph, X)
    assert all((again.get_parameter(name)[off] == 0).all() for name, off in zeros.items())


@pytest.mark.parametrize("new_weights", ["initial", "zero"])
def test_connections_double_until_all_are_on(new_weights: Any) -> None:
    dense = resnet()
    schedule = gp.IncrementalConnections(dense, X, every=2, start=0.1, new_weights=new_weights)
    model = schedule.model
    fractions, grew = [], []
    before = {name: mask.connections for name, mask in masks_of(model).items()}

    def step() -> None:
        nonlocal before
        grew.append(schedule.step())
        fractions.append(schedule.fraction)
        after = {name: mask.connections for name, mask in masks_of(model).items()}
        assert all((before[name] <= after[name]).all() for name in before)
        before = after

    trained(model.train(), 9, step)
    assert fractions == pytest.approx([0.1, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8, 1.0, 1.0])
    assert grew == [False, True, False, True, False, True, False, True, False]
    assert all(on.all() for on in before.values())


def test_new_connections_start_as_asked() -> None:
    dense = resnet()
    for new_weights in ("initial", "zero"):
        schedule = gp.IncrementalConnections(
            dense, X, every=1, start=0.25, factor=4, new_weights=new_weights
        )
        on = masks_of(schedule.model)["stage3.conv2.weight"].connections
        schedule.step()
        weight, wanted = schedule.model.stage3.conv2.weight, dense.stage3.conv2.weight
        assert torch.equal(weight[on], wanted[on])
        assert torch.equal(
            weight[~on], wanted[~on] if new_weights == "initial" else wanted[~on] * 0
        )


def test_a_schedule_goes_on_where_it_was() -> None:
    first, second = (gp.IncrementalConnections(resnet(), X, every=3, start=0.1) for _ in range(2))
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.fraction == first.fraction == pytest.approx(0.2)
    for one, other in zip(
        masks_of(first.model).values(), masks_of(second.model).values(), strict=True
    ):
        assert np.array_equal(one.connections, other.connections)


@pytest.mark.parametrize("share", [1, 8])
def test_weak_connections_are_exchanged_for_promising_ones(share: int) -> None:
    model = gp.connect_sparsely(resnet(), 0.25, X, share=share).train()
    schedule = gp.DropAndGrow(model, every=2, until=8, fraction=0.5)
    counts = {name: mask.connections.sum(1) for name, mask in masks_of(model).items()}
    blocks = {n: len(np.unique(m.connections, axis=0)) for n, m in masks_of(model).items()}
    exchanged, changes = [], []

    def step() -> None:
        before = {name: mask.connections.copy() for name, mask in masks_of(model).items()}
        weights = {name: model.get_submodule(name[:-7]).weight.detach() for name in before}
        gradients = {name: mask.gradient for name, mask in masks_of(model).items()}
        exchanged.append(schedule.step())
        changes.append(0)
        for name, mask in masks_of(model).items():
            now = mask.connections
            new, gone = now & ~before[name], before[name] & ~now
            changes[-1] += int(new.sum())
            assert (now.sum(1) == counts[name]).all()
            assert len(np.unique(now, axis=0)) <= blocks[name]
            assert (model.get_submodule(name[:-7]).weight[torch.from_numpy(new)] == 0).all()
            if share == 1 and new.any():
                strength = weights[name].abs().flatten(2).sum(2)
                promise = gradients[name].abs().flatten(2).sum(2)
                for row in np.flatnonzero(new.any(1)):
                    stays = before[name][row] & now[row]
                    assert strength[row][gone[row]].max() <= strength[row][stays].min()
                    off = ~before[name][row] & ~now[row]
                    assert promise[row][new[row]].min() >= promise[row][off].max()

    trained(model, 8, step)
    assert exchanged == [False, True, False, True, False, True, False, False]
    assert changes[1] > changes[3] > changes[5] > 0
    assert changes[0] == changes[2] == changes[6] == changes[7] == 0


def test_an_exchange_goes_on_where_it_was() -> None:
    whole, half = (gp.connect_sparsely(resnet(), 0.25, X, share=8).train() for _ in range(2))
    first = gp.DropAndGrow(whole, every=2, until=20)
    trained(whole, 3, first.step)
    half.load_state_dict(whole.state_dict())
    second = gp.DropAndGrow(half, every=2, until=20)
    second.load_state_dict(first.state_dict())
    trained(whole, 3, first.step)
    trained(half, 3, second.step)
    for one, other in zip(masks_of(whole).values(), masks_of(half).values(), strict=True):
        assert np.array_equal(one.connections, other.connections)


# -------------------------------------------------------------------------------------- width


@pytest.mark.parametrize("multiplier", [0.3, 0.5, 1.0])
def test_a_narrower_network_is_fresh_and_has_its_widths(multiplier: float) -> None:
    dense = resnet()
    narrow = gp.width_multiplier(dense, multiplier, X)
    assert isinstance(narrow, ResNet8)
    assert narrow.stage3.conv2.out_channels == math.ceil(64 * multiplier)
    assert narrow.stage1.conv1.weight.shape[:2] == (math.ceil(16 * multiplier),) * 2
    weight = narrow.stage3.conv2.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * weight[0].numel()), rel=0.1)
    assert (narrow.norm.running_mean == 0).all()
    again, other = (gp.width_multiplier(dense, multiplier, X, seed=seed) for seed in (0, 1))
    assert torch.equal(again.stage3.conv2.weight, weight)
    assert not torch.equal(other.stage3.conv2.weight, weight)
