"""Operators of torchvision, which may be loaded later or not at all: they are known by name."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from graphprune.layout import Axis, Product, size_of
from graphprune.rules.contraction import CONVOLUTION
from graphprune.rules.registry import Call, Layouts, rule


@rule("torchvision::deform_conv2d")
def deformable_convolution(call: Call) -> Sequence[Layouts]:
    """Convolve at positions that are moved by offsets and weighted by a mask, both for each offset group.

    An offset group has `[groups, positions in the window, 2]` channels of offsets and half as many of
    the mask, and moves its share of the input channels.
    """
    channels, window = call.layouts("input")[1], prod(call["weight"].shape[2:])
    operands = [call[name] for name in ("input", "weight", "bias")]
    (result,) = CONVOLUTION.apply(call, operands, {"g": call["groups"]})
    groups = Axis(call["offset_groups"])
    group_channels = Axis(size_of(channels) // size_of(groups))
    call.unify(channels, Product((groups, group_channels)))
    for name, shifts_per_group in (("offset", 2 * window), ("mask", window)):
        if name == "mask" and not call["use_mask"]:  # a tensor that is not read
            continue
        batch, shifts, *positions = call.layouts(name)
        call.unify(batch, result[0])
        call.unify(shifts, Product((groups, call.fixed(shifts_per_group, "a window"))))
        for layout in positions:
            call.fix(layout, "a spatial extent")
    return [result]
