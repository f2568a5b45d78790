"""Norms: what is normalised together may be cut only inexactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import UNIT, Layout, Product, can_split, split
from graphprune.rules.pattern import Pattern
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten

BATCH_NORM = Pattern.parse("b c *s, c?, c?, c?, c? -> b c *s, c, c")


@rule(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_no_update,
    aten.cudnn_batch_norm,
)
def batch_norm(call: Call) -> Sequence[Layouts]:
    """Scale and shift each channel; in training, by statistics over the batch and over space."""
    results = BATCH_NORM(call)
    updates = call.func.overloadpacket is aten._batch_norm_with_update
    if call.arguments.get("training", updates):
        for dim, layout in enumerate(results[0]):
            if dim != 1:
                call.renormalise(layout, "normalised over the batch")
    return results


@rule(aten.native_layer_norm)
def layer_norm(call: Call) -> Sequence[Layouts]:
    """Normalise over the last dimensions together."""
    layouts = call.layouts("input")
    normalised = layouts[len(layouts) - len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            for input_layout, parameter_layout in zip(normalised, call.layouts(name), strict=True):
                call.unify(input_layout, parameter_layout)
    for layout in normalised:
        call.renormalise(layout, "normalised over these channels")
    # Mean and inverse deviation keep the normalised dimensions, as size 1.
    units: list[Layout] = [UNIT] * len(normalised)
    statistics = [*layouts[: len(layouts) - len(normalised)], *units]
    return [layouts, statistics, statistics]


@rule(aten.native_group_norm)
def group_norm(call: Call) -> Sequence[Layouts]:
    """Normalise over the channels of each group and over space."""
    layouts = list(call.layouts("input"))
    channels = layouts[1]
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unify(channels, call.layouts(name)[0])
    group_size = call["C"] // call["group"]
    if not can_split(channels, group_size):
        call.fix(channels, "normalisation groups that cut across channels")
        return [layouts]
    # 32 channels in 8 groups are `(8 4)`: whole groups
    # may go exactly, channels within them only inexactly.
    outer, inner = split(channels, group_size, call.why("normalisation groups"))
    for layout in (inner, *layouts[2:]):
        call.renormalise(layout, "normalised over the channels of a group")
    layouts[1] = Product((outer, inner))
    return [layouts, [layouts[0], outer], [layouts[0], outer]]
