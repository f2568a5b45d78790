"""Pooling, resampling and other operators on trailing spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from graphprune.layout import Product, size_of
from graphprune.rules.pattern import pattern
from graphprune.rules.registry import Call, Layouts, Rule, register, rule
from graphprune.rules.reshape import regroup

aten = torch.ops.aten


def _make_rule_over_last(count: int) -> Rule:
    """Return the rule of operators that mix only the last `count` dimensions."""

    def spatial(call: Call) -> Sequence[Layouts]:
        layouts = call.layouts_of(call.tensors[0])
        for layout in layouts[len(layouts) - count :]:
            call.fix(layout, "a spatial extent")
        leading = layouts[: len(layouts) - count]
        return [
            [*leading, *(call.fixed(size, "a spatial extent") for size in output.shape[-count:])]
            for output in call.outputs
        ]

    return spatial


def _make_unpooling_rule(count: int) -> Rule:
    """Return the rule of operators that write back to where a pooling took from."""
    pooling_rule = _make_rule_over_last(count)

    def unpool(call: Call) -> Sequence[Layouts]:
        for input_layout, index_layout in zip(
            call.layouts("self"), call.layouts("indices"), strict=True
        ):
            call.unify(input_layout, index_layout)
        return pooling_rule(call)

    return unpool


register(_make_unpooling_rule(2), aten.max_unpool2d)
register(_make_unpooling_rule(3), aten.max_unpool3d)
register(
    _make_rule_over_last(1),
    aten.reflection_pad1d,
    aten.replication_pad1d,
    aten.upsample_linear1d,
    aten.upsample_nearest1d,
    aten._upsample_nearest_exact1d,
)
register(
    _make_rule_over_last(2),
    aten.avg_pool2d,
    aten._adaptive_avg_pool2d,
    aten.adaptive_max_pool2d,
    aten.max_pool2d_with_indices,
    aten.reflection_pad2d,
    aten.replication_pad2d,
    aten.upsample_bicubic2d,
    aten.upsample_bilinear2d,
    aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
    aten.upsample_nearest2d,
    aten._upsample_nearest_exact2d,
)
register(
    _make_rule_over_last(3),
    aten.avg_pool3d,
    aten._adaptive_avg_pool3d,
    aten.adaptive_max_pool3d,
    aten.max_pool3d_with_indices,
    aten.reflection_pad3d,
    aten.replication_pad3d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact3d,
    aten.upsample_trilinear3d,
)


@rule(aten.im2col)
def windows(call: Call) -> Sequence[Layouts]:
    """Lay the windows of an image side by side, every channel with its window's positions inside it."""
    *leading, channels, height, width = call.layouts("self")
    for layout in (height, width):
        call.fix(layout, "a spatial extent")
    window = call.fixed(prod(call["kernel_size"]), "a window")
    window_positions = call.fixed(call.outputs[0].shape[-1], "positions of windows")
    return [[*leading, Product((channels, window)), window_positions]]


@rule(aten.col2im)
def overlay_windows(call: Call) -> Sequence[Layouts]:
    """Add windows up to an image: the inverse of laying them side by side."""
    *leading, columns, window_positions = call.layouts("self")
    call.fix(window_positions, "positions of windows")
    window = prod(call["kernel_size"])
    # `[batch, channels * window, window_positions]`: of
    # every channel, its window's positions side by side.
    sizes = [size_of(columns) // window, window]
    channels, inside_window = regroup(
        [columns], sizes, call.why("windows that cut across channels")
    )
    call.fix(inside_window, "a window")
    extents = [call.fixed(size, "a spatial extent") for size in call["output_size"]]
    return [[*leading, channels, *extents]]


pattern("b c *s, b *t 2 -> b c *u", aten.grid_sampler_2d, aten.grid_sampler_3d)
