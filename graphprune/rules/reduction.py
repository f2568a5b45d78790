"""Operators that run along dimensions: sums, statistics, softmax, scans and orderings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.layout import UNIT
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten


def _read_dims(call: Call) -> list[int]:
    """Return the dimensions that the call runs along: the ones it names, or all."""
    rank = call.tensors[0].dim()
    named = call.arguments.get("dim", call.arguments.get("dims"))
    if named is None or named == []:
        return list(range(rank))
    named = [named] if isinstance(named, int) else named
    # A scalar has no dimensions but takes 0 and -1 as one.
    return [dim % max(rank, 1) for dim in named]


def _remove_dims(call: Call, layouts: Layouts, dims: Sequence[int]) -> list[Layouts]:
    """Return the layouts of every output once `dims` are reduced, kept as size 1 if asked."""
    if call.arguments.get("keepdim"):
        remaining: Layouts = [UNIT if i in dims else layout for i, layout in enumerate(layouts)]
    else:
        remaining = [layout for i, layout in enumerate(layouts) if i not in dims]
    return [remaining] * len(call.outputs)


def _operand(call: Call) -> Tensor:
    return call.tensors[0]


@rule(
    aten.sum,
    aten.any,
    aten._is_any_true,
    aten.nansum,
    aten.linalg_vector_norm,
    aten.norm,
    aten.count_nonzero,
)
def total(call: Call) -> Sequence[Layouts]:
    """Reduce so that a silenced slot adds nothing (a p-norm with p > 0 does)."""
    layouts, dims = call.layouts_of(_operand(call)), _read_dims(call)
    order = call.arguments.get("ord", call.arguments.get("p"))
    if isinstance(order, (int, float)) and order <= 0:
        for dim in dims:
            call.renormalise(layouts[dim], "a norm in which absent slots count")
    return _remove_dims(call, layouts, dims)


@rule(
    aten.mean,
    aten.var,
    aten.std,
    aten.var_mean,
    aten.std_mean,
    aten.amax,
    aten.amin,
    aten.prod,
    aten.logsumexp,
    aten.all,
    aten._is_all_true,
    aten.aminmax,
)
def statistic(call: Call) -> Sequence[Layouts]:
    """Reduce to a statistic over the slots that are there."""
    layouts, dims = call.layouts_of(_operand(call)), _read_dims(call)
    for dim in dims:
        call.renormalise(layouts[dim], "a statistic over these channels")
    return _remove_dims(call, layouts, dims)


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(call: Call) -> Sequence[Layouts]:
    """Normalise along a dimension to a distribution over the slots that are there."""
    layouts = call.layouts("self")
    for dim in _read_dims(call):
        call.renormalise(layouts[dim], "a softmax over these channels")
    return [layouts]


@rule(aten.cumsum)
def cumulative_sum(call: Call) -> Sequence[Layouts]:
    """Add up along a dimension; a silenced slot changes nothing after it."""
    return [call.layouts("self")]


@rule(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def fourier(call: Call) -> Sequence[Layouts]:
    """Transform along dimensions, whose slots are then frequencies: they are fixed."""
    layouts = list(call.layouts("self"))
    for dim in _read_dims(call):
        call.fix(layouts[dim], "a Fourier transform along these positions")
        layouts[dim] = call.fixed(call.outputs[0].shape[dim], "frequencies")
    return [layouts]


@rule(aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp)
def scan(call: Call) -> Sequence[Layouts]:
    """Run along a dimension in a way that silenced slots disturb: it is fixed."""
    layouts = call.layouts("self")
    if layouts:
        call.fix(layouts[call.dim()], "a running operation along these channels")
    return [layouts] * len(call.outputs)


@rule(aten.max, aten.min, aten.median, aten.nanmedian, aten.mode)
def choice(call: Call) -> Sequence[Layouts]:
    """Reduce to the value of one of the slots that are there; who reads which one, reads numbers."""
    layouts, dims = call.layouts("self"), _read_dims(call)
    for dim in dims:
        call.renormalise(layouts[dim], "a statistic over these channels")
    if len(call.outputs) > 1:
        _keep_numbers(call, 1)
    return _remove_dims(call, layouts, dims)


@rule(aten.argmax, aten.argmin)
def number(call: Call) -> Sequence[Layouts]:
    """Reduce to the number of a slot, which whoever reads it relies on."""
    _keep_numbers(call, 0)
    return _remove_dims(call, call.layouts("self"), _read_dims(call))


def _keep_numbers(call: Call, output: int) -> None:
    """Fix what the call runs along, should anything read the numbers that an output holds."""
    layouts, dims = call.layouts_of(_operand(call)), _read_dims(call)

    def fix_numbered() -> None:
        for dim in dims:
            call.fix(layouts[dim], "slots are compared and numbered")

    call.when_read(output, fix_numbered)


@rule(aten.kthvalue)
def kth_value(call: Call) -> Sequence[Layouts]:
    """Reduce to the slot of some rank among all of them: fixed."""
    layouts, dims = call.layouts("self"), _read_dims(call)
    for dim in dims:
        call.fix(layouts[dim], "slots are compared and numbered")
    return _remove_dims(call, layouts, dims)


@rule(aten.sort, aten.topk)
def ordering(call: Call) -> Sequence[Layouts]:
    """Order the slots along a dimension, which is fixed."""
    layouts = list(call.layouts("self"))
    if layouts:
        dim = call.dim()
        call.fix(layouts[dim], "slots are sorted")
        layouts[dim] = call.fixed(call.outputs[0].shape[dim], "slots are sorted")
    return [layouts] * len(call.outputs)
