"""The models that other tests use are what they say, run, and hide nothing behind zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.utils.inputs import Inputs, call, output_tensors
from tests import models
from tests.structures import STRUCTURES


def assert_lively(output: Any) -> None:
    """Every tensor of the output is finite and differs from entry to entry."""
    tensors = dict(output_tensors(output))
    assert tensors
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        assert 1e-2 < tensor.float().std() < 1e2, name


def with_batch_of_3(inputs: Any) -> Inputs:
    return Inputs.of(inputs).map(lambda t: torch.cat([t, t[:1]]))


@pytest.fixture(params=sorted(models.ALL))
def name(request: pytest.FixtureRequest) -> str:
    if request.param in models.TRANSFORMERS:
        pytest.importorskip("transformers")
    return str(request.param)


def test_full_models_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, small=False)
    assert sum(p.numel() for p in model.parameters()) == models.ENTRIES[name].parameters


def test_small_models_run_at_any_batch_size(name: str) -> None:
    example = models.ALL[name](small=True)
    assert not example.model.training
    assert sum(p.numel() for p in example.model.parameters()) < 1_000_000
    first = call(example.model, Inputs.of(example.inputs))
    assert_lively(first)
    second = call(example.model, with_batch_of_3(example.inputs))
    for (_, two), (_, three) in zip(output_tensors(first), output_tensors(second), strict=True):
        torch.testing.assert_close(three[:2], two, rtol=1e-3, atol=1e-4)


def test_small_models_react_to_their_input(name: str) -> None:
    example = models.ALL[name](small=True)
    for key, output in output_tensors(call(example.model, Inputs.of(example.inputs))):
        assert (output[0] - output[1]).abs().mean() > 0.05 * output.std(), key


def test_small_models_are_the_same_each_time(name: str) -> None:
    one, two = models.ALL[name](), models.ALL[name]()
    for (key, a), (_, b) in zip(
        one.model.state_dict().items(), two.model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key


def test_no_parameter_of_a_small_model_is_trivial(name: str) -> None:
    example = models.ALL[name]()
    for key, parameter in example.model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 1e-2, key
    for module in example.model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.running_mean.std() > 1e-3
            assert module.running_var.std() > 1e-4


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_structures_run_at_any_batch_size(structure: Any) -> None:
    model, inputs = structure.build(), structure.inputs()
    assert_lively(call(model, Inputs.of(inputs)))
    assert_lively(call(model, with_batch_of_3(inputs)))


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_structures_are_the_same_each_time(structure: Any) -> None:
    first, second = (call(structure.build(), Inputs.of(structure.inputs())) for _ in range(2))
    for (key, a), (_, b) in zip(output_tensors(first), output_tensors(second), strict=True):
        assert torch.equal(a, b), key


def test_both_branches_of_the_control_flow_can_be_reached() -> None:
    structure = STRUCTURES["control_flow"]
    model, taken = structure.build(), set()
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: taken.add(name))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        call(model, Inputs(3 * torch.randn(1, 14, generator=generator)))
    assert taken == {"first", "a", "b", "last"}


def test_randomising_with_inputs_keeps_a_deep_signal_alive() -> None:
    layers: list[nn.Module] = []
    for _ in range(40):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    inputs = torch.randn(2, 8, 6, 6)
    output: Tensor = call(models.randomise(nn.Sequential(*layers), inputs), Inputs(inputs))
    assert 0.2 < output.std() < 5
    assert (output[0] - output[1]).abs().mean() > 0.1
