"""Sparse convolutions lowered to what computes the connections that are on, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from graphprune.passes import LowerSparseConnections, SparseConnections
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.demo.network import ResNet8
from graphprune.onnx_export.providers import Runtime
from graphprune.runtime.autotune.convolution import ConvolutionShape, find_fastest_form
from graphprune.sparsity.connections.filter_blocks import Blocks
from tests import models

X = torch.randn(2, 3, 12, 12)


def wide(**options: Any) -> nn.Module:
    """Two convolutions of 64 channels between one that reads the image and a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, **options), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return models.randomise(model, X).eval()


def calls(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if name in str(node.target)]


def lowered(masked: nn.Module, x: Tensor, **options: Any) -> fx.GraphModule:
    graph, changed = LowerSparseConnections(measured=False, **options)(masked, x)
    assert changed
    wanted, found = masked.double()(x.double()), graph.double()(x.double())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    masked.float(), graph.float()
    return graph


# -------------------------------------------------------------------------------------- blocks


@given(
    blocks=st.integers(1, 5),
    size=st.integers(1, 5),
    inputs=st.integers(2, 16),
    count=st.integers(1, 16),
    dead=st.integers(0, 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=200, deadline=None)
def test_blocks_hold_every_connection_once(
    blocks: int, size: int, inputs: int, count: int, dead: int, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    rows = np.zeros((blocks, inputs), dtype=bool)
    for row in rows:
        row[chance.permutation(inputs)[: min(count, inputs)]] = True
    on = np.repeat(rows, size, axis=0)[chance.permutation(blocks * size)]
    on[:dead] = False
    found = Blocks.of(on)
    if not on.any():
        assert found is None
        return
    assert sorted(found.filters[found.filters >= 0]) == list(range(len(on)))
    assert found.filters.size <= 1.15 * len(on)
    for filters, channels in zip(found.filters, found.channels, strict=True):
        filters = filters[filters >= 0]
        assert len(set(channels)) == len(channels)
        others = np.setdiff1d(np.arange(inputs), channels)
        assert not on[np.ix_(filters, others)].any()
    if not dead and len(np.unique(rows, axis=0)) == blocks:
        assert found.filters.shape == (blocks, size)


def test_there_are_no_more_blocks_than_needed() -> None:
    on = np.zeros((12, 8), dtype=bool)
    on[:6, :4], on[6:, 4:] = True, True
    on[0, 1], on[7] = False, False  # inside a block's channels, and none at all
    found = Blocks.of(on)
    assert found is not None
    assert found.filters.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert found.channels.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ------------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"stride": 2, "padding": 2, "bias": False},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
@pytest.mark.parametrize("pattern", ["random", "expander", "magnitude"])
def test_a_gather_and_a_grouped_convolution_compute_the_masked_one(
    options: Any, pattern: Any
) -> None:
    masked, _ = SparseConnections(0.5, pattern=pattern, share=16)(wide(**options), X)
    graph = lowered(masked, X)
    convolutions = calls(graph, "aten.conv2d")
    assert [node.args[6] for node in convolutions[1:]] == [4, 4]
    assert len(calls(graph, "index_select")) == 2  # filters stand together by the order of channels
    assert graph.get_parameter("3.weight").shape == (64, 32, 3, 3)
    assert not calls(graph, "mul")


def test_channels_that_one_block_reads_are_put_together_without_a_gather() -> None:
    masked = wide(padding=1)
    order = np.random.default_rng(0).permutation(64)
    with torch.no_grad():
        for at, channels in enumerate(order.reshape(4, 16)):
            off = np.setdiff1d(np.arange(64), channels)
            masked[3].weight[np.ix_(np.arange(64)[at::4], off)] = 0
    graph = lowered(masked, X)
    assert not calls(graph, "index_select")
    assert [node.args[6:] for node in calls(graph, "aten.conv2d")] == [(), (4,), ()]


def test_where_the_order_is_the_outputs_own_filters_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1))
    masked, _ = SparseConnections(0.25, pattern="magnitude", share=8)(model, X)
    graph = lowered(masked, X)
    assert len(calls(graph, "index_select")) == 2


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "unet", "shufflenet_v2"])
@pytest.mark.parametrize("pattern", ["random", "magnitude"])
def test_networks_with_branches_compute_what_they_did(name: str, pattern: Any) -> None:
    example = models.ALL[name](small=True)
    model, x = example.model.eval(), example.inputs
    masked, _ = SparseConnections(0.5, pattern=pattern, share=8)(model, x)
    graph, changed = LowerSparseConnections(measured=False)(masked, x)
    assert changed
    inputs = gp.Inputs.of(x).map(lambda tensor: tensor.double())
    with torch.no_grad():
        wanted, found = (net.double()(*inputs.args) for net in (masked, graph))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_one_and_three_dimensions_too() -> None:
    for layer, x in ((nn.Conv1d, torch.randn(2, 3, 9)), (nn.Conv3d, torch.randn(2, 3, 4, 5, 6))):
        torch.manual_seed(0)
        model = nn.Sequential(layer(3, 16, 1), nn.ReLU(), layer(16, 16, 3, padding=1))
        masked, _ = SparseConnections(0.25, share=4)(model, x)
        assert calls(lowered(masked, x), "conv")[-1].args[6] == 4


def test_a_window_of_one_is_a_product_of_matrices_where_that_is_fastest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def chosen(shape: ConvolutionShape, runtime: Runtime) -> str:
        return shape.forms[-1]

    monkeypatch.setattr("graphprune.passes.lower_sparse_connections.find_fastest_form", chosen)
    masked, _ = SparseConnections(0.5, share=16)(wide(padding=1), X)
    graph, _ = LowerSparseConnections()(masked, X)
    assert len(calls(graph, "matmul")) == 1
    torch.testing.assert_close(graph(X), masked(X), rtol=1e-5, atol=1e-6)
    bigger = torch.randn(5, 3, 20, 17)
    torch.testing.assert_close(graph(bigger), masked(bigger), rtol=1e-5, atol=1e-6)
    exported = gp.export(graph, X, tmp_path / "product.onnx")
    assert exported.batch_free
    kinds = [node.op_type for node in onnx.load(exported.path).graph.node]
    assert kinds.count("Gather") == 2
    assert kinds.count("MatMul") == 1
    assert (tmp_path / "product.onnx").stat().st_size < 100_000


def test_what_gains_nothing_stays_dense_and_is_said() -> None:
    masked, _ = SparseConnections(0.25, share=1)(wide(padding=1), X)
    with pytest.warns(
        gp.GraphPruneWarning, match=r"no faster on cpu stay dense: 3\.weight \(64 bl"
    ):
        graph, _ = LowerSparseConnections()(masked, X)
    assert not calls(graph, "index_select")
    torch.testing.assert_close(graph(X), masked(X))


def test_a_dense_network_is_left_as_it_was() -> None:
    graph, changed = LowerSparseConnections()(ResNet8(), torch.randn(1, 1, 28, 28))
    assert not changed
    assert not calls(graph, "index_select")


def test_a_few_zeros_do_not_make_a_convolution_sparse() -> None:
    model = wide(padding=1)
    with torch.no_grad():
        model[3].weight[5, 7] = 0
        model[3].weight[9] = 0
    graph, changed = LowerSparseConnections()(model, X)
    assert not changed
    assert torch.equal(graph.get_parameter("3.weight"), model[3].weight)


def test_the_model_that_was_given_stays() -> None:
    model = wide(padding=1)
    masked, _ = SparseConnections(0.25, pattern="magnitude", share=16)(model, X)
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    LowerSparseConnections(measured=False)(masked, X)
    assert all(torch.equal(before[name], value) for name, value in masked.state_dict().items())
    assert model[3].weight.ne(0).all()


def test_sparse_connections_of_a_module_are_lowered_and_train_on() -> None:
    model = gp.connect_sparsely(wide(padding=1), 0.25, X, share=16)
    graph, _ = LowerSparseConnections(measured=False)(model, X)
    torch.testing.assert_close(graph(X), model(X), rtol=1e-5, atol=1e-6)
    assert gp.count_parameters(graph) < gp.count_parameters(model) / 2
    graph.train()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(graph(X), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_pipeline_gives_a_smaller_and_faster_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 128, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()]
    model, x = nn.Sequential(*layers), torch.randn(1, 3, 28, 28)
    text = "sparse-connections{fraction=0.25}, fold-batch-norm, lower-sparse-connections"
    slim = gp.Pipeline.parse(text)(model, x)
    assert gp.count_macs(slim, x) < 0.3 * gp.count_macs(model, x)
    dense, sparse = (
        gp.export(m, x, tmp_path / f"{name}.onnx").path for name, m in (("a", model), ("b", slim))
    )
    assert sparse.stat().st_size < 0.3 * dense.stat().st_size
    kinds = {node.op_type for node in onnx.load(sparse).graph.node}
    assert kinds == {"Conv", "Gather", "Relu"}


def test_dead_filters_go_before_lowering() -> None:
    masked, _ = SparseConnections(0.25, pattern="magnitude", share=16)(wide(padding=1), X)
    assert any(not mask.any(1).all() for mask in masked.buffers() if mask.dtype == torch.bool)
    small = gp.Pipeline.parse("absorb-constants, eliminate-dead-channels")(masked, X)
    assert small.get_parameter("3.weight").shape[0] < 64
    graph, _ = LowerSparseConnections(measured=False)(small, X)
    torch.testing.assert_close(graph(X), masked(X), rtol=1e-5, atol=1e-6)


def test_the_race_has_every_form_and_a_winner() -> None:
    shape = ConvolutionShape(
        (1, 64, 14, 14), (64, 64, 3, 3), 2, 32, 16, (1, 1), (1, 1), (1, 1), True, True
    )
    assert shape.forms == ["dense", "grouped"]
    assert find_fastest_form(shape, Runtime()) == "grouped"
    point = ConvolutionShape(
        (1, 64, 14, 14), (64, 64, 1, 1), 2, 32, 16, (1, 1), (0, 0), (1, 1), True, False
    )
    assert point.forms == ["dense", "grouped", "product"]
    assert find_fastest_form(point, Runtime()) in point.forms
