"""Norms: what is normalised together may be cut only inexactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import Product, can_split, split
from graphprune.rules.pattern import pattern
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten

pattern(
    "b c *s, c?, c?, c?, c? -> b c *s",
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_no_update,
    aten.cudnn_batch_norm,
    aten.batch_norm,
)


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def layer_norm(call: Call) -> Sequence[Layouts]:
    """Normalise over the last dimensions together."""
    layouts = call.layouts("input")
    normalised = layouts[len(layouts) - len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            for mine, its in zip(normalised, call.layouts(name), strict=True):
                call.unify(mine, its)
    for layout in normalised:
        call.renormalise(layout, "normalised over these channels")
    return [layouts]


@rule(aten.native_group_norm)
def group_norm(call: Call) -> Sequence[Layouts]:
    """Normalise over the channels of each group and over space."""
    layouts = list(call.layouts("input"))
    channels = layouts[1]
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unify(channels, call.layouts(name)[0])
    each = call["C"] // call["group"]
    if not can_split(channels, each):
        call.fix(channels, "normalisation groups that cut across channels")
        return [layouts]
    outer, inner = split(channels, each, call.why("normalisation groups"))
    for layout in (inner, *layouts[2:]):
        call.renormalise(layout, "normalised over the channels of a group")
    layouts[1] = Product((outer, inner))
    return [layouts]
