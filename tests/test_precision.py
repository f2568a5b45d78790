"""Models and operators that do not run in float64: what they are analysed and compared in instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.inference.infer import infer
from graphprune.inference.precision import Precision
from graphprune.shrink import tensors
from graphprune.utils.inputs import Inputs


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8)


KINDS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def only() -> Iterator[Callable[[torch.dtype], Any]]:
    """Give an operator that doubles tensors of one type and refuses all others."""
    operators = []
    with torch.library._scoped_library("precision", "FRAGMENT") as library:

        def made(dtype: torch.dtype) -> Any:
            name = f"twice_{str(dtype).removeprefix('torch.')}"

            def twice(x: Tensor) -> Tensor:
                if x.dtype != dtype:
                    raise RuntimeError(f"expected {dtype}, found {x.dtype}")
                return x * 2

            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, twice, "CPU")
            library.impl(name, torch.empty_like, "Meta")
            operator = getattr(torch.ops.precision, name)
            gp.pattern("*a -> *a", operator)
            operators.append(operator)
            return operator

        yield made
    gp.rules.unregister(*operators)


class Through(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))  # type: ignore[no-any-return]


def checked_by_code(x: Tensor) -> Tensor:
    """Refuse what is not of the type that weights have by default."""
    if x.dtype != torch.float32:
        raise TypeError(f"this takes float32, not {x.dtype}")
    return x.relu()


def quietly(model: nn.Module, x: Tensor, **options: Any) -> gp.Slimmed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gp.GraphPruneWarning)
        return gp.slimmed(model, 0.5, x, align=1, **options)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_an_operator_without_a_float64_kernel_runs_on_rounded_copies(only: Any, dtype: Any) -> None:
    operator = only(dtype)
    model = Through(operator).to(dtype).eval()
    with pytest.warns(gp.GraphPruneWarning, match=r"precision\.twice_.* not compute in float64"):
        result = gp.slimmed(model, 0.5, torch.randn(2, 6, dtype=dtype), align=1)
    assert result.verification is not None
    assert result.verification.dtype == dtype
    assert result.model.a.out_features == 8


def test_a_model_whose_code_refuses_float64_runs_in_its_own_type() -> None:
    model, x = Through(checked_by_code).eval(), torch.randn(2, 6)
    assert not infer(model, Inputs(x)).in_double
    with pytest.warns(gp.GraphPruneWarning, match="Through does not compute in float64"):
        result = gp.slimmed(model, 0.5, x, align=1)
    assert result.verification is not None
    assert result.verification.dtype == torch.float32
    assert result.model.a.out_features == 8


def test_a_model_in_its_own_type_may_take_ways_that_depend_on_values() -> None:
    def chosen(x: Tensor) -> Tensor:
        return checked_by_code(x) if x.sum() > 1e4 else checked_by_code(x).exp()

    result = quietly(Through(chosen).eval(), torch.randn(2, 6))
    assert result.graph.inference.with_data
    assert result.verification is not None
    assert result.model.a.out_features == 8


def test_what_runs_in_float64_is_compared_in_float64() -> None:
    result = gp.slimmed(Through(torch.relu).eval(), 0.5, torch.randn(2, 6), align=1)
    assert result.verification is not None
    assert result.verification.dtype == torch.float64


@pytest.mark.parametrize("dtype", [None, *KINDS], ids=str)
def test_a_wrong_slot_is_caught_in_every_type(only: Any, dtype: Any, monkeypatch: Any) -> None:
    model = Through(checked_by_code if dtype is None else only(dtype)).to(dtype).eval()
    sliced = tensors.slice_tensor

    def rolled(tensor: Tensor, *rest: Any) -> Tensor | None:
        cut: Tensor | None = sliced(tensor, *rest)
        return cut if cut is None or cut.shape != (3, 8) else cut.roll(1, 1)

    monkeypatch.setattr("graphprune.shrink.tensors.slice_tensor", rolled)
    with pytest.raises(gp.VerificationError, match="differs by"):
        quietly(model, torch.randn(2, 6, dtype=dtype), form="module")


def test_a_model_that_runs_in_no_type_is_said_not_to_run_as_its_own_type_fails() -> None:
    with pytest.raises(gp.CaptureError, match=r"mat1 and mat2 shapes cannot be multiplied"):
        gp.slim(Through(checked_by_code).eval(), 0.5, torch.randn(2, 5))


def test_what_an_operator_writes_to_its_arguments_is_written_though_it_ran_on_copies() -> None:
    with torch.library._scoped_library("precision", "FRAGMENT") as library:

        def count(x: Tensor, seen: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            seen.add_(1)
            return x * seen

        library.define("count(Tensor x, Tensor(a!) seen) -> Tensor")
        library.impl("count", count, "CPU")
        gp.pattern("*a c, c -> *a c", torch.ops.precision.count)

        class Counting(Through):
            def __init__(self) -> None:
                super().__init__(torch.relu)
                self.register_buffer("seen", torch.arange(16.0))

            def forward(self, x: Tensor) -> Tensor:
                counted = torch.ops.precision.count(self.a(x), self.seen)
                return self.b(counted * self.seen)  # type: ignore[no-any-return]

        result = quietly(Counting().eval(), torch.randn(2, 6))
        gp.rules.unregister(torch.ops.precision.count)
    assert result.model.seen.shape == (8,)


def test_the_coarsest_type_decides_how_nearly_two_runs_agree() -> None:
    precision = Precision()
    assert (precision.dtype, precision.tolerance) == (torch.float64, 1e-7)
    precision.note(torch.ops.aten.relu.default, torch.int64)
    precision.note(torch.ops.aten.relu.default, torch.complex64)
    assert (precision.dtype, precision.tolerance) == (torch.float32, 1e-4)
    precision.note(torch.ops.aten.gelu.default, torch.bfloat16)
    precision.note(torch.ops.aten.gelu.default, torch.float16)
    assert precision.operators == {"aten.relu": torch.float32, "aten.gelu": torch.bfloat16}
    assert precision.dtype == torch.bfloat16


# ------------------------------------------------------------------------------- fake quantisation


class PerChannel(nn.Module):
    """A layer whose output channels have a scale each, one of them a parameter, as learnt ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.register_buffer("scale", torch.rand(16) + 0.01)
        self.register_buffer("zero_point", torch.randint(9, (16,), dtype=torch.int32))
        self.learnt = nn.Parameter(torch.rand(16) + 0.01)
        self.learnt_zero = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_channel_affine(
            self.a(x), self.scale, self.zero_point, 1, 0, 255
        )
        rounded = torch._fake_quantize_learnable_per_channel_affine(
            rounded, self.learnt, self.learnt_zero, 1, 0, 255, 1.0
        )
        return self.b(torch.fake_quantize_per_tensor_affine(rounded, 0.1, 0, 0, 255))  # type: ignore[no-any-return]


def test_scales_and_zero_points_follow_the_channels_of_fake_quantisation() -> None:
    model, x = PerChannel().eval(), images()
    slim = quietly(model, x).model
    kept = [int((model.scale == value).nonzero()) for value in slim.scale]
    assert len(kept) == 8
    assert torch.equal(slim.a.weight, model.a.weight[kept])
    assert torch.equal(slim.zero_point, model.zero_point[kept])
    assert torch.equal(slim.learnt, model.learnt[kept])
    assert slim.learnt_zero.shape == (8,)


class Gated(nn.Sequential):
    """Layers that quantisation-aware training prepares, by torch's own tools."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip


@pytest.fixture
def prepared() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch has it no more")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = Gated().train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        model = quantization.prepare_qat(model)
        model(images(4))
    return model.eval()


@pytest.mark.parametrize("observing", [0, 1])
def test_a_model_prepared_for_quantisation_aware_training_is_slimmed(
    prepared: nn.Module, observing: int
) -> None:
    for name, buffer in prepared.named_buffers():
        if name.endswith("observer_enabled"):
            buffer.fill_(observing)
    slim = quietly(prepared, images()).model
    assert slim[0].weight.shape == (8, 3, 3, 3)
    assert slim[0].weight_fake_quant.scale.shape == (8,)
    assert slim[0].weight_fake_quant.activation_post_process.min_val.shape == (8,)
    slim.train()(images()).sum().backward()
    assert slim[0].weight.grad is not None


def test_the_numbers_of_a_maximum_are_read_where_code_looks_at_them() -> None:
    def stated(x: Tensor) -> Tensor:
        largest, where = x.max(1)
        return x * largest.unsqueeze(1) + len(where.tolist())

    with pytest.warns(gp.GraphPruneWarning, match="no channels of this model can be removed"):
        gp.slim(Through(stated).eval(), 0.5, torch.randn(2, 6), renormalised=True)


def test_weights_that_torchao_quantised_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(gp.InvalidRequestError, match=r"0\.weight, 2\.weight hold quantised"):
        gp.slim(model, 0.5, torch.randn(2, 64))


def test_a_recurrent_layer_of_packed_weights_is_refused_by_its_own_name() -> None:
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch has it no more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantization.quantize_dynamic(nn.ModuleDict({"gates": nn.LSTM(4, 8)}), {nn.LSTM})
    with pytest.raises(gp.InvalidRequestError, match=r"^gates holds quantised weights"):
        gp.slim(model, 0.5, torch.randn(2, 3, 4))


# ----------------------------------------------------------------------- infinities and not-a-numbers

NUMBERS = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])


@pytest.mark.parametrize("other", [7.0, torch.inf, torch.finfo(torch.float64).max])
@pytest.mark.parametrize("at", range(4))
def test_what_is_no_finite_number_has_to_stand_at_the_same_places(at: int, other: float) -> None:
    from graphprune.verify import _difference

    assert _difference("x", NUMBERS.double(), NUMBERS.double(), 1e-7) == 0
    changed = NUMBERS.double()
    if float(changed[at]) == other:
        other = -other
    changed[at] = other
    with pytest.raises(gp.VerificationError, match="x of the slim model"):
        _difference("x", NUMBERS.double(), changed, 1e-7)


def test_outputs_that_are_masked_by_infinities_are_compared_where_they_are_finite() -> None:
    class Masked(Through):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.masked_fill(torch.tensor([True, False, False]), -torch.inf)

    result = gp.slimmed(Masked(torch.relu).eval(), 0.5, torch.randn(2, 6), align=1)
    assert result.verification is not None
    assert result.verification.difference < 1e-7
