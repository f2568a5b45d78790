"""Translation validation: the slim model against the original with the removed slots silenced.

The original is run operator by operator, in float64 wherever that works. Every removed entry of a
parameter or buffer, and every removed slot of what an operator makes, is set to zero; an operator
that takes a statistic along a cut axis is given the kept slots alone. Its result, without the removed
slots, must be the slim model's. Slicing and rewritten literals play no part on this side, so they are
what is checked.

For `y = sigmoid(x @ W.T) @ V.T`, of whose four hidden slots b and d are removed:

    the original, silenced                          the slim model
    W  [4, in]   rows b, d are zero                 W' [2, in]   rows a, c
    s  [4]       sigmoid(..) = a .5 c .5,
                 zeroed again: a 0 c 0              s' [2]       a c
    y  [out]     columns b, d of V meet zeros       y' [out]     the same sums

That every result is zeroed, not the weights alone, is what makes this exact: 0.5 would have gone on.

A parameter that is zero everywhere (a residual branch before its training) would hide whatever it
multiplies, so both sides take another constant for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from graphprune.errors import (
    CaptureError,
    GraphPruneError,
    InvalidRequestError,
    OtherOperatorsError,
    VerificationError,
    listed,
    warn,
)
from graphprune.inference.infer import make_stand_ins, not_runnable_error
from graphprune.inference.interpreter import Interpretation, interpret
from graphprune.inference.precision import Precision
from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import Axis, Layout, size_of
from graphprune.masks import Mask, count_kept_slots, kept_size, mask_of, touches
from graphprune.rules import Rule, is_in_place, tensors_in
from graphprune.shrink.graph_literals import restrict_arguments
from graphprune.shrink.tensors import slice_tensor
from graphprune.utils.inputs import Inputs, output_tensors
from graphprune.utils.tensors import (
    copy_with,
    evaluation_mode,
    named_tensors,
    parameter_names,
    working_copy,
)

aten = torch.ops.aten

Call: TypeAlias = tuple[OpOverload, list[tuple[int, ...]]]
"""An operator, and the shapes of the tensors that it gave."""


@dataclass(frozen=True)
class Verification:
    """What a verification saw.

    Attributes:
        difference: largest absolute difference of an output, over the largest absolute value in it.
        outputs: number of output tensors compared.
        inputs: what both were run on: the example inputs, and those of other sizes that the model takes.
        dtype: the coarsest type that something was computed in: float64 but for models and operators
            that do not run in it.

    """

    difference: float
    outputs: int
    inputs: tuple[Inputs, ...]
    dtype: torch.dtype = torch.float64

    def join(self, other: Verification) -> Verification:
        """Return what both verifications of one slim model saw."""
        difference = max(self.difference, other.difference)
        return replace(self, difference=difference, inputs=(*self.inputs, *other.inputs))


class Silencing(Interpretation):
    """Runs the recorded operators again, on data, with the removed slots of every result at zero.

    Args:
        model: what is run, whose own tensors the operators should read as recorded.
        inference: what was recorded.
        masks: which slots of each cut axis stay.
        precision: in which types it is run.

    """

    def __init__(
        self,
        model: nn.Module,
        inference: Inference,
        masks: Mapping[Axis, Mask],
        precision: Precision | None = None,
    ) -> None:
        super().__init__(precision)
        self.inference = inference
        self.masks = masks
        self.names: dict[int, str] = {}
        for name, tensor in named_tensors(model).items():
            self.names.setdefault(id(tensor), name)
        self.number = 0

    def step(self, func: OpOverload, rule: Rule | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator and zero what is removed from its result."""
        step = self._recorded(func, args, kwargs)
        if step is None:
            return self.run(func, args, kwargs)
        self.number += 1
        if step.renormalises and any(self._is_cut(value) for value in step.inputs):
            return self._on_kept_slots(step, args, kwargs)
        result = self.run(func, args, kwargs)
        if not func.is_view:  # a view shows what is silent already
            for tensor, value in zip(_tensors(result), step.outputs, strict=False):
                _silence(tensor, value.layouts, self.masks)
        return result

    def _recorded(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Step | None:
        """Return the recorded operator that this one is; None for one that made no tensor."""
        steps = self.inference.steps
        if self.number < len(steps) and self._is(steps[self.number], func, args, kwargs):
            return steps[self.number]
        if any("Tensor" in str(result.type) for result in func._schema.returns):
            raise self._strayed_to(str(func))
        return None

    def _is(self, step: Step, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> bool:
        """Say whether the operator is the recorded one, on the same tensors of the model."""
        if step.func is not func:
            return False
        names = (self.names.get(id(t)) for t in tensors_in((*args, *kwargs.values())))
        sources = (v.source if isinstance(v.source, str) else None for v in step.inputs)
        # None: made by an operator, so it has no name that could differ
        return all(
            name is None or source is None or name == source
            for name, source in zip(names, sources, strict=False)
        )

    def check_at_end(self) -> None:
        """Raise OtherOperatorsError where the run ended before the recorded one."""
        if self.number < len(self.inference.steps):
            raise self._strayed_to("the end")

    def _strayed_to(self, operator: str) -> OtherOperatorsError:
        steps = self.inference.steps
        expected = str(steps[self.number].func) if self.number < len(steps) else "the end"
        return OtherOperatorsError(
            f"the model ran other operators than when it was analysed: step {self.number} is {operator}, "
            f"where the analysis saw {expected}; its control flow depends on values, so pass "
            "example_inputs that take the usual path"
        )

    def _is_cut(self, value: Value) -> bool:
        return any(touches(layout, self.masks) for layout in value.layouts)

    def _on_kept_slots(self, step: Step, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the operator on the kept slots alone and put the result back among zeros.

        A layer norm over [.., 4] of which two are kept is one over [.., 2]: with zeros in the other two
        its mean and variance would be others than the slim model's.
        """
        kept = count_kept_slots(self.masks)
        values = iter(step.inputs)

        def cut(tensor: Tensor) -> Tensor:
            kept_part = slice_tensor(tensor, next(values).layouts, self.masks)
            return tensor if kept_part is None else kept_part

        small_args, small_kwargs = pytree.tree_map_only(Tensor, cut, (args, kwargs))
        small = restrict_arguments(step, small_args, small_kwargs, kept)
        result = self.run(step.func, *small)
        if is_in_place(step.func):
            raise VerificationError(
                f"{replace(step.place, why='an in-place statistic along a cut axis')}: give its rule to an "
                "operator that returns the result instead"
            )
        return pytree.tree_map_only(Tensor, _Embed(step.outputs, self.masks), result)


class _Embed:
    """Puts the kept slots of successive results back among zeros."""

    def __init__(self, values: Sequence[Value], masks: Mapping[Axis, Mask]) -> None:
        self.values = iter(values)
        self.masks = masks

    def __call__(self, tensor: Tensor) -> Tensor:
        for dim, layout in enumerate(next(self.values).layouts):
            if touches(layout, self.masks):
                tensor = _spread(tensor, dim, layout, self.masks)
        return tensor


def _spread(tensor: Tensor, dim: int, layout: Layout, masks: Mapping[Axis, Mask]) -> Tensor:
    mask = mask_of(layout, masks)
    shape = list(tensor.shape)
    shape[dim] = len(mask)  # [.., kept, ..] -> [.., all, ..]
    where = torch.from_numpy(mask.nonzero()[0])
    return tensor.new_zeros(shape).index_copy_(dim, where, tensor)


def _tensors(result: Any) -> list[Tensor]:
    return list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))


@dataclass(frozen=True)
class Run:
    """What a model is run on to be verified.

    Attributes:
        inputs: example inputs.
        inference: the layouts of the original's tensors, as found on these inputs.
        masks: which slots of each cut axis stay.

    """

    inputs: Inputs
    inference: Inference
    masks: Mapping[Axis, Mask]


def verify(
    model: nn.Module,
    slimmer: nn.Module,
    run: Run,
    others: Sequence[Run] = (),
    *,
    as_it_is: bool = False,
) -> Verification:
    """Compare a slim model with the silenced original, in float64 unless the original does not run so.

    Args:
        model: the original.
        slimmer: the slim model.
        run: what both are run on.
        others: what both are run on besides, as far as the original takes it.
        as_it_is: leave parameters that are zero everywhere at zero, for a model whose control flow
            depends on them.

    Raises:
        VerificationError: they differ by more than rounding, or the slim model does not run.
        InvalidRequestError: the inputs give no finite number to compare.

    """
    constants = {} if as_it_is else _constants_for_zeros(model)
    with ExitStack() as copies:
        in_double = _Sides(model, slimmer, run, constants, Precision(run.inference.in_double))
        copies.callback(in_double.release)
        try:
            sides, verification = in_double, in_double.compare_on(run)
        except CaptureError:
            if not in_double.precision.double:
                raise
            in_double.release()
            sides = _Sides(model, slimmer, run, constants, Precision(double=False))
            copies.callback(sides.release)
            verification = sides.compare_on(run)
        for other in others:
            try:
                verification = verification.join(sides.compare_on(other))
            except (CaptureError, InvalidRequestError, OtherOperatorsError):
                continue  # the values of these inputs take the original another way, or nowhere
    if sides.precision.operators:
        _say_how_precisely(model, sides.precision)
    return replace(verification, dtype=sides.precision.dtype)


def silenced_outputs(model: nn.Module, run: Run) -> list[tuple[str, Tensor]]:
    """Return the outputs of the original with the removed slots silenced."""
    precision = Precision(run.inference.in_double)
    return _run_silenced(silenced_copy(model, run.inference, run.masks, {}), run, precision)


def _run_silenced(silenced: nn.Module, run: Run, precision: Precision) -> list[tuple[str, Tensor]]:
    silenced = working_copy(silenced).eval()
    mode = Silencing(silenced, run.inference, run.masks, precision)
    try:
        outputs = list(output_tensors(interpret(silenced, run.inputs.map(precision.copy), mode)))
        mode.check_at_end()
        return outputs
    except GraphPruneError:
        raise
    except Exception as failure:
        raise not_runnable_error(silenced, run.inputs, failure) from failure


class _Sides:
    """Copies of both models for any number of runs: the silenced original, and the slim model."""

    def __init__(
        self,
        model: nn.Module,
        slimmer: nn.Module,
        run: Run,
        constants: Mapping[str, float],
        precision: Precision,
    ) -> None:
        self.model = model
        self.precision = precision
        self.original = silenced_copy(model, run.inference, run.masks, constants, precision)
        filled = partial(_filled_copy, constants=constants, precision=precision)
        self.slim = _without_derivatives(copy_with(slimmer, filled))

    def release(self) -> None:
        """Give the memory of both copies back.

        The error of a comparison that failed holds their modules, by the frames of its traceback, and is
        kept while the next way is tried.
        """
        for copy in (self.original, self.slim):
            for tensor in named_tensors(copy).values():
                tensor.data = tensor.data.new_empty(0)

    def compare_on(self, run: Run) -> Verification:
        """Run both, each from the state that it was given in, and compare their outputs."""
        expected = _run_silenced(self.original, run, self.precision)
        _check_comparable(self.model, expected)
        inputs = run.inputs.map(self.precision.copy)
        outputs = _outputs(working_copy(self.slim), inputs, _Counting(self.precision))
        differences = (
            _difference(name, output, slim_output, self.precision.tolerance)
            for (name, output), (_, slim_output) in zip(expected, outputs, strict=True)
        )
        return Verification(max(differences), len(expected), (run.inputs,))


def _say_how_precisely(model: nn.Module, precision: Precision) -> None:
    what = listed(sorted(precision.operators)) if precision.double else type(model).__name__
    verb = "do" if precision.double and len(precision.operators) > 1 else "does"
    kind = str(precision.dtype).removeprefix("torch.")
    warn(
        f"{what} {verb} not compute in float64, so the slim model was compared with the original in "
        f"{kind}, to {precision.tolerance:g} of the largest value instead of rounding"
    )


def check_runs(
    slimmer: nn.Module,
    inputs: Inputs,
    inference: Inference,
    kept: Mapping[Axis, int] | None = None,
) -> None:
    """Run a slim model for the shapes of its outputs, without data where the original needs none.

    Args:
        slimmer: the slim model.
        inputs: what it is run on.
        inference: the layouts of the original's tensors.
        kept: how many slots of each cut axis are left, to check what each operator computes as well: a
            reshape to half as many heads, or to as many of half the size, would give the same output.

    Raises:
        VerificationError: it does not run, its outputs have other shapes than the original's, or one of
            its operators gives something else than the original's does, without what is removed.

    """
    precision = Precision(inference.in_double)
    mode = _Counting(precision)
    shapes = {name: list(map(size_of, layouts)) for name, layouts in inference.outputs.items()}
    if inference.with_data:
        outputs = _slim_outputs(slimmer, inputs, {}, mode)
    else:
        with make_stand_ins(slimmer, inputs, precision) as (stand_in, empty_inputs):
            outputs = _outputs(stand_in, empty_inputs, mode)
    for name, tensor in outputs:
        if list(tensor.shape) != shapes[name]:
            raise _other_shape(name, list(tensor.shape), shapes[name])
    if kept is not None and mode.calls != list(_expected_calls(inference, kept)):
        raise VerificationError(
            "the slim model's operators do not give what the original's do without the removed channels"
        )


def _expected_calls(inference: Inference, kept: Mapping[Axis, int]) -> Iterator[Call]:
    """Yield the operators of the original that compute, with the shapes that the slim model has to give."""
    for step in inference.steps:
        if _computes(step.func):
            shapes = [tuple(kept_size(x, kept) for x in value.layouts) for value in step.outputs]
            yield step.func, shapes


def _computes(func: OpOverload) -> bool:
    """Say whether an operator computes: code often skips views and copies where a size is 1."""
    return not func.is_view and func is not aten.clone.default


def _constants_for_zeros(model: nn.Module) -> dict[str, float]:
    """Return, for each parameter that is zero everywhere, a constant of the usual size of weights."""
    return {
        name: 0.5 * max(1, math.prod(parameter.shape[1:])) ** -0.5  # not 1, as in 1 / (1 - p)
        for name, parameter in parameter_names(model).items()
        if parameter.is_floating_point() and not parameter.detach().any()
    }


def _check_comparable(model: nn.Module, outputs: list[tuple[str, Tensor]]) -> None:
    if any(bool(torch.isfinite(tensor).any()) for _, tensor in outputs if tensor.numel()):
        return
    with_nan = [name for name, tensor in named_tensors(model).items() if _has_nan(tensor)]
    verb = "hold" if len(with_nan) > 1 else "holds"
    cause = f", since {listed(with_nan)} {verb} NaN" if with_nan else ""
    raise InvalidRequestError(
        f"{type(model).__name__} gives no finite number on the example inputs{cause}, so there is "
        "nothing to compare; pass other example_inputs, or verify=False to leave the result unchecked"
    )


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def silenced_copy(
    model: nn.Module,
    inference: Inference,
    masks: Mapping[Axis, Mask],
    constants: Mapping[str, float],
    precision: Precision | None = None,
) -> nn.Module:
    """Return a copy of the model with the removed entries of its tensors at zero.

    Args:
        model: the original.
        inference: the layouts of its tensors.
        masks: which slots of each cut axis stay.
        constants: by name, a number to fill a parameter with.
        precision: in which types it holds them; by default in those that were inferred in.

    """
    precision = precision or Precision(inference.in_double)
    copy = partial(_filled_copy, constants=constants, precision=precision)
    return _without_derivatives(copy_with_slots_zeroed(model, inference, masks, copy))


def _without_derivatives(model: nn.Module) -> nn.Module:
    """Return the model as it is analysed: torch multiplies what it may have to derive in another way."""
    return model.requires_grad_(False)


def _plain_copy(_: str, tensor: Tensor) -> Tensor:
    """Return a copy in the tensor's own precision."""
    return tensor.detach().clone()


def copy_with_slots_zeroed(
    model: nn.Module,
    inference: Inference,
    masks: Mapping[Axis, Mask],
    copy: Callable[[str, Tensor], Tensor] = _plain_copy,
) -> nn.Module:
    """Return a copy of the model with the removed entries of its tensors at zero."""

    def silenced(name: str, tensor: Tensor) -> Tensor:
        value = copy(name, tensor)
        if name not in inference.addressed:  # an order of slots, which those that are zero keep
            _silence(value, inference.parameters[name], masks)
        return value

    return copy_with(model, silenced)


def _silence(tensor: Tensor, layouts: Sequence[Layout], masks: Mapping[Axis, Mask]) -> None:
    for dim, layout in enumerate(layouts):
        if touches(layout, masks):
            gone = torch.from_numpy((~mask_of(layout, masks)).nonzero()[0])
            tensor.index_fill_(dim, gone, 0)


class _Counting(Interpretation):
    """Runs a model, and keeps which operators computed what shapes."""

    def __init__(self, precision: Precision) -> None:
        super().__init__(precision)
        self.calls: list[Call] = []

    def step(self, func: OpOverload, rule: Rule | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the operator."""
        result = self.run(func, args, kwargs)
        shapes = [tuple(tensor.shape) for tensor in _tensors(result)]
        if shapes and _computes(func):
            self.calls.append((func, shapes))
        return result


def _filled_copy(
    name: str, tensor: Tensor, constants: Mapping[str, float], precision: Precision
) -> Tensor:
    copy = precision.copy(tensor)
    return copy.fill_(constants[name]) if name in constants else copy


def _slim_outputs(
    slimmer: nn.Module, inputs: Inputs, constants: Mapping[str, float], mode: _Counting
) -> list[tuple[str, Tensor]]:
    filled = partial(_filled_copy, constants=constants, precision=mode.precision)
    return _outputs(copy_with(slimmer, filled), inputs.map(mode.precision.copy), mode)


def _outputs(slimmer: nn.Module, inputs: Inputs, mode: _Counting) -> list[tuple[str, Tensor]]:
    try:
        with evaluation_mode(slimmer):  # not by eval(): it is run as it will be
            return list(output_tensors(interpret(slimmer, inputs, mode)))
    except GraphPruneError:
        raise
    except Exception as failure:
        raise VerificationError(
            f"the slim model does not run: {type(failure).__name__}: {failure}"
        ) from failure


def _other_shape(name: str, shape: list[int], expected: list[int]) -> VerificationError:
    return VerificationError(f"{name} of the slim model has shape {shape}, not {expected}")


def _difference(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> float:
    """Return the largest difference over the largest value; raise where it is not rounding.

    Infinities and numbers that are none have to stand at the same places on both sides.
    """
    if expected.shape != actual.shape:
        raise _other_shape(name, list(actual.shape), list(expected.shape))
    if expected.is_complex() and actual.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    if not expected.is_floating_point():
        if not torch.equal(expected, actual):
            count = int((expected != actual).sum())
            raise VerificationError(
                f"{name} of the slim model differs in {count} of {expected.numel()} entries"
            )
        return 0.0
    # Where the original is finite, so is the slim model; elsewhere they are the same infinity, or both NaN.
    finite = torch.isfinite(expected)
    agree = torch.where(finite, torch.isfinite(actual), _equal_or_nan(expected, actual))
    if not bool(agree.all()):
        raise VerificationError(
            f"{name} of the slim model is infinite or no number at other places than the original with "
            f"the removed channels silenced, in {int((~agree).sum())} of {expected.numel()} entries"
        )
    if not bool(finite.any()):
        return 0.0
    expected, actual = expected[finite].double(), actual[finite].double()
    scale, gap = float(expected.abs().max()), float((expected - actual).abs().max())
    if gap > tolerance * max(scale, 1e-30):
        raise VerificationError(
            f"{name} of the slim model differs by {gap:.3g} from the original with the removed channels "
            f"silenced, whose largest value is {scale:.3g}"
        )
    return gap / scale if scale else 0.0


def _equal_or_nan(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())
