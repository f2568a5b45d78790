"""The paper's second-order back-propagation: against the formulas written by hand, and the exact ones."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.batches import batches_of
from graphprune.capture.capture import capture
from graphprune.groups.groups import Scores
from graphprune.importance import ScoringContext, scores
from graphprune.utils.inputs import Inputs


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


def sigmoid_net() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (4, 6, 5, 3)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers).double()


def some_data(*shape: int, outputs: int = 3, batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(9, *shape, generator=generator).double(),
            torch.rand(9, outputs, generator=generator).double(),
        )
        for _ in range(batches)
    ]


def scored(criterion: str, model: nn.Module, data: Any, loss: Any = squared) -> Scores:
    graph = gp.analyze(model, data[0][0])
    return scores(ScoringContext(model, graph, batches_of(data), loss), criterion)


def by_hand(model: Any, x: Tensor, target: Tensor) -> list[Tensor]:
    """Return -o dE/do + o2/2 d2E/do2 of the hidden layers, by the paper's recursion."""
    outputs = [x]
    with torch.no_grad():
        for linear in model[::2]:
            outputs.append(linear(outputs[-1]).sigmoid())
        by_output, twice = outputs[-1] - target, torch.ones_like(target)
        changes: list[Tensor] = []
        for linear, o, before in zip(
            reversed(model[::2]), reversed(outputs[1:]), reversed(outputs[1:-1]), strict=False
        ):
            slope = o * (1 - o)
            curve = slope * (1 - 2 * o)
            by_sum, twice = by_output * slope, twice * slope**2 + by_output * curve
            by_output, twice = by_sum @ linear.weight, twice @ linear.weight**2
            changes.insert(0, (-before * by_output + before**2 * twice / 2).sum(0))
    return changes


def test_it_is_the_recursion_of_the_paper() -> None:
    model, data = sigmoid_net(), some_data(4)
    wanted = [sum(parts) / 2 for parts in zip(*(by_hand(model, *one) for one in data), strict=True)]
    found = scored("taylor2_recursion", model, data)
    assert list(found) == ["0.weight:0", "2.weight:0"]
    for given, expected in zip(found.values(), wanted, strict=True):
        np.testing.assert_allclose(given, np.asarray(expected), rtol=1e-9)


def test_it_is_exact_for_the_last_hidden_layer_and_not_for_the_first() -> None:
    model, data = sigmoid_net(), some_data(4)
    found, exact = (scored(c, model, data) for c in ("taylor2_recursion", "taylor2"))
    np.testing.assert_allclose(found["2.weight:0"], exact["2.weight:0"], rtol=1e-6)
    off = np.abs(found["0.weight:0"] / exact["0.weight:0"] - 1)
    assert off.max() > 0.01


@pytest.mark.parametrize("mixed", [False, True])
def test_the_second_derivatives_of_the_loss_are_exact(mixed: bool) -> None:
    """Cross-entropy mixes the outputs of a sample, its square also the samples."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(output, target.argmax(1))
        return value.square() if mixed else value

    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = some_data(4, batches=1)
    x, target = data[0]
    outputs = net(x).detach()
    with torch.no_grad():
        o = net[:2](x)
    hessian: Any = torch.func.hessian(lambda y: loss(y, target))(outputs)
    second = torch.einsum("bcbc->bc", hessian) @ net[2].weight ** 2
    first = torch.func.grad(lambda y: loss(y, target))(outputs) @ net[2].weight
    wanted = (o**2 * second / 2 - o * first).sum(0)
    (given,) = scored("taylor2_recursion", net, data, loss).values()
    np.testing.assert_allclose(given, wanted.detach(), rtol=1e-7)


def conv_net(activation: nn.Module) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), activation, nn.Dropout(0.5),
        nn.MaxPool2d(2), nn.Conv2d(4, 5, 2, groups=1), activation, nn.Flatten(), nn.Linear(20, 3),
    ).double()  # fmt: skip


def element_by_element(model: Any, until: int, x: Tensor, target: Tensor) -> Any:
    """Return the terms of what a layer reads with the exact second derivative of each of its entries."""
    model = model.eval()
    with torch.no_grad():
        read = model[:until](x)

    def loss(flat: Tensor) -> Tensor:
        return squared(model[until:](flat.reshape(read.shape)), target)

    flat = read.flatten()
    first = torch.func.grad(loss)(flat)
    second = torch.func.hessian(loss)(flat).diagonal()
    terms = (flat**2 * second / 2 - flat * first).reshape(read.shape)
    return terms.detach()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()])
def test_a_convolutional_network_with_batch_norms_is_scored_in_evaluation_mode(
    activation: nn.Module,
) -> None:
    model, data = conv_net(activation), some_data(2, 8, 8, batches=1)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(model[1], name).uniform_(0.5, 1.5)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    found = scored("taylor2_recursion", model, data)
    # the last layer is exact, entry by entry; a channel's entries are summed
    terms = element_by_element(model, 8, *data[0]).reshape(9, 5, 4).sum((0, 2))
    np.testing.assert_allclose(found["5.weight:0"], terms, rtol=1e-6)
    assert np.isfinite(found["0.weight:0"]).all()
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])


def test_batch_norms_scale_both_derivatives_as_folding_them_does() -> None:
    model, data = conv_net(nn.Tanh()), some_data(2, 8, 8, batches=1)
    inner: Any = nn.BatchNorm2d(5).double()
    norm = model[1]
    with torch.no_grad():
        for one in (norm, inner):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(one, name).uniform_(0.5, 1.5)
    model.insert(6, inner)
    folded = conv_net(nn.Tanh())
    folded.load_state_dict(
        {name.replace("9.", "8."): v for name, v in model.state_dict().items() if name[0] != "6"}
    )
    scale = inner.weight / (inner.running_var + inner.eps).sqrt()
    with torch.no_grad():
        folded[5].weight.mul_(scale.reshape(-1, 1, 1, 1))
        folded[5].bias.copy_((folded[5].bias - inner.running_mean) * scale + inner.bias)
    given, wanted = (scored("taylor2_recursion", m, data)["0.weight:0"] for m in (model, folded))
    np.testing.assert_allclose(given, wanted, rtol=1e-9)


class Residual(nn.Module):
    """Channels that two layers read, one of them behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x).sigmoid()
        return self.last(y + self.inner(y)).sigmoid()


def test_the_readers_of_a_group_are_summed_and_counted_once() -> None:
    torch.manual_seed(0)
    model, data = Residual().double(), some_data(4)
    found, first = (scored(c, model, data) for c in ("taylor2_recursion", "taylor"))
    halved = scored("taylor2_recursion", model, data, lambda y, t: squared(y, t) / 2)
    assert list(found) == list(first) == ["first.weight:0"]
    np.testing.assert_allclose(halved["first.weight:0"], found["first.weight:0"] / 2, rtol=1e-9)

    x, target = data[0]
    y = model.first(x).sigmoid().detach()
    z = (y + model.inner(y)).detach()
    out = model.last(z).sigmoid().detach()
    slope = out * (1 - out)
    by_sum = (out - target) * slope
    twice = slope**2 + (out - target) * slope * (1 - 2 * out)
    g, h = by_sum @ model.last.weight, twice @ model.last.weight**2
    inner_g, inner_h = g @ model.inner.weight, h @ model.inner.weight**2
    wanted = z**2 * h / 2 - z * g + y**2 * inner_h / 2 - y * inner_g
    (given,) = scored("taylor2_recursion", model, data[:1]).values()
    np.testing.assert_allclose(given, wanted.sum(0).detach(), rtol=1e-9)


def test_a_mean_over_positions_shares_out_both_derivatives() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv1d(2, 4, 2), nn.Conv1d(4, 5, 2), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
        nn.Linear(10, 3),
    ).double()  # fmt: skip
    data = some_data(2, 8, batches=1)
    found = scored("taylor2_recursion", model, data)["0.weight:0"]
    x, target = data[0]
    with torch.no_grad():
        read = model[0](x)
        by_output = (model(x) - target) @ model[4].weight
        twice = torch.ones(9, 3).double() @ model[4].weight ** 2
        g = by_output.reshape(9, 5, 2).repeat_interleave(3, dim=2) / 3
        h = twice.reshape(9, 5, 2).repeat_interleave(3, dim=2) / 9
        g = F.conv_transpose1d(g, model[1].weight)
        h = F.conv_transpose1d(h, model[1].weight ** 2)
        wanted = (read**2 * h / 2 - read * g).sum((0, 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_groups_that_no_layer_reads_go_last() -> None:
    class OwnOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.first, self.last = (
                nn.Parameter(torch.ones(7)), nn.Linear(4, 6), nn.Linear(6, 3),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x).tanh()) + self.scale.square().sum()

    torch.manual_seed(0)
    found = scored("taylor2_recursion", OwnOutput().double(), some_data(4))
    assert np.isinf(found["scale:0"]).all()
    assert np.isfinite(found["first.weight:0"]).all()


def test_a_graph_is_scored_as_the_model_it_is_of_and_bfloat16_works() -> None:
    model, data = sigmoid_net(), some_data(4)
    graph_module = capture(model, Inputs(data[0][0]))
    given, wanted = (scored("taylor2_recursion", m, data) for m in (graph_module, model))
    for name, values in wanted.items():
        np.testing.assert_allclose(given[name], values, rtol=1e-12)
    half = [(x.bfloat16(), t.bfloat16()) for x, t in data]
    rough = scored("taylor2_recursion", model.bfloat16(), half)
    for name, values in wanted.items():
        np.testing.assert_allclose(rough[name], values, atol=0.1 * np.abs(values).max())


class Does(nn.Module):
    """A hidden layer, a last layer, a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.last(self.first(x).relu()))


def test_an_operator_that_is_not_known_is_named() -> None:
    says = (
        r"importance='taylor2_recursion' does not go back through aten\.cumsum "
        r"\(test_recursion\.py:\d+\): it knows layers with weights of their own, element-wise functions, "
        r"means and what moves values; use importance='taylor2', whose second derivatives are exact"
    )
    with pytest.raises(gp.InvalidRequestError) as caught:
        scored("taylor2_recursion", Does(lambda y: y.cumsum(1)).double(), some_data(4))
    assert re.fullmatch(says, str(caught.value))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda y: torch.cat(y.split(2, 1), 1), r"aten\.split"),
        (lambda y: torch.fft.fft(y).real, r"aten\.fft_fft"),
        (lambda y: y @ y.mT @ y, r"aten\.matmul"),
        (lambda y: F.adaptive_avg_pool1d(F.pad(y, (0, 1)), 3), r"aten\.adaptive_avg_pool1d"),
    ],
)
def test_lists_complex_numbers_products_and_overlapping_windows_are_refused(
    function: Any, operator: str
) -> None:
    with pytest.raises(gp.InvalidRequestError, match=f"back through {operator} "):
        scored("taylor2_recursion", Does(function).double(), some_data(4))


class InPlace(nn.Module):
    """Reads channels before they are overwritten, and, through another name, after."""

    def __init__(self, in_place: bool, after: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.in_place, self.after = in_place, after

    def forward(self, x: Tensor) -> Any:
        y = self.first(x).tanh()
        z = 2 * y
        kept = y.view(-1, 3, 2) if self.after else y
        kept = kept.relu_() if self.in_place else kept.relu()
        return self.last(z + (y if self.after else kept))


def test_what_was_read_before_it_was_overwritten_counts_as_it_was() -> None:
    found: list[Any] = []
    for in_place in (True, False):
        torch.manual_seed(0)
        found += scored("taylor2_recursion", InPlace(in_place).double(), some_data(4)).values()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_what_is_overwritten_and_read_under_another_name_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(gp.InvalidRequestError, match=r"aten\.relu_ "):
        scored("taylor2_recursion", Wrapped().double(), some_data(4))


class Wrapped(nn.Module):
    """Channels upstream of a value that is overwritten through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(4, 4), InPlace(True, after=True)

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.before(x).sigmoid())
