"""Operators that make tensors from nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import Axis
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten


@rule(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.empty,
    aten.empty_strided,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.new_empty_strided,
    aten.empty_permuted,
)
def uniform(call: Call) -> Sequence[Layouts]:
    """Fill with one value: every slot is like every other, so the dimensions are free."""
    return [[Axis(size) for size in output.shape] for output in call.outputs]


@rule(
    aten.arange,
    aten.linspace,
    aten.logspace,
    aten.eye,
    aten.rand,
    aten.randn,
    aten.randint,
    aten.randperm,
    aten.rand_like,
    aten.randn_like,
    aten.randint_like,
    aten.bernoulli,
    aten.uniform,
    aten.normal,
    aten.exponential,
    aten.random,
    aten.tril_indices,
    aten.triu_indices,
    aten.scalar_tensor,
)
def fill_by_position(call: Call) -> Sequence[Layouts]:
    """Make values that depend on the position (or on chance): the dimensions are fixed."""
    for tensor in call.tensors:
        for layout in call.layouts_of(tensor):
            call.fix(layout, "values drawn at random")
    why = "made of values that depend on the position"
    return [[call.fixed(size, why) for size in output.shape] for output in call.outputs]
