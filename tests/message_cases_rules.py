"""What is said of models that do not run in float64, of quantised weights, and of what is no number."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.shrink import tensors
from tests.message_cases import Does, X, case, net


def _in_float32(_: nn.Module, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return x


def _in_steps(_: nn.Module, x: Tensor) -> Tensor:
    steps, zeros = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    x = torch.fake_quantize_per_channel_affine(x, steps, zeros.int(), 1, 0, 255)
    return torch._fake_quantize_learnable_per_channel_affine(x, steps, zeros, 1, 0, 255, 1.0)


@case(
    "Does does not compute in float64, so the slim model was compared with the original in float32, to "
    "0.0001 of the largest value instead of rounding"
)
def in_its_own_type(_: Path) -> Any:
    return gp.slim(Does(lambda m, x: m.last(_in_float32(m, x))), 0.5, X)


@case(
    "aten._fake_quantize_learnable_per_channel_affine, aten.fake_quantize_per_channel_affine_cachemask do "
    "not compute in float64, so the slim model was compared with the original in float32, to 0.0001 of "
    "the largest value instead of rounding"
)
def operators_without_float64(_: Path) -> Any:
    return gp.slim(Does(lambda m, x: m.last(_in_steps(m, x))), 0.5, X)


@case(
    "0, 2 hold quantised weights, whose channels cannot be cut; slim the model first and quantise the slim "
    "one"
)
def quantised(_: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
    return gp.slim(model, 0.5, X)


@case(
    "Sequential gives no finite number on the example inputs, since 1.running_mean holds NaN, so there is "
    "nothing to compare; pass other example_inputs, or verify=False to leave the result unchecked"
)
def no_number(_: Path) -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model[1].running_mean.fill_(torch.nan)
    return gp.slim(model, 0.5, X, importance="random")


@case(
    "output of the slim model is infinite or no number at other places than the original with the removed "
    "channels silenced, in 2 of 6 entries"
)
def no_number_in_the_slim_model(_: Path) -> Any:
    right = tensors.slice_tensor

    def spoilt(tensor: Tensor, *rest: Any) -> Tensor | None:
        cut: Tensor | None = right(tensor, *rest)
        if cut is not None and cut.shape[0] == 3:
            cut[1] = torch.nan
        return cut

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("graphprune.shrink.tensors.slice_tensor", spoilt)
        return gp.slim(net(), 0.5, X, form="module")
