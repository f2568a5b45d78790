"""Fake quantisation: values rounded to what a few bits can hold, as quantisation-aware training does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import size_of
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten


@rule(
    aten.fake_quantize_per_tensor_affine_cachemask,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
    aten._fake_quantize_learnable_per_tensor_affine,
)
def quantise_by_tensor(call: Call) -> Sequence[Layouts]:
    """Round each element with one scale; the second output says which were inside the range."""
    return [call.layouts("self")] * len(call.outputs)


@rule(
    aten.fake_quantize_per_channel_affine_cachemask,
    aten._fake_quantize_learnable_per_channel_affine,
)
def quantise_by_channel(call: Call) -> Sequence[Layouts]:
    """Round each element with the scale and the zero point of its channel."""
    _share_channels(call, "axis", "scale", "zero_point")
    return quantise_by_tensor(call)


@rule(aten._fused_moving_avg_obs_fq_helper, aten._fused_moving_avg_obs_fq_helper_functional)
def observe_and_quantise(call: Call) -> Sequence[Layouts]:
    """Round with a scale that follows the range of the values, channel by channel or for the tensor.

    A range always holds zero, so silenced slots do not widen it. They may count in the moving average
    where all other values are above zero, or all below; for a whole tensor, which may be of activations,
    it is therefore compared on the kept slots.
    """
    qparam_names = ["running_min", "running_max", "scale", "zero_point"]
    if call["per_row_fake_quant"]:
        _share_channels(call, "ch_axis", *qparam_names)
    else:
        call.renormalises = True
    # Only the functional form returns these four too;
    # what is described beyond the results is dropped.
    values, *qparam_layouts = quantise_by_tensor(call)[:2], *map(call.layouts, qparam_names)
    return [*values, *qparam_layouts]


def _share_channels(call: Call, axis: str, *names: str) -> None:
    """Let tensors that hold a number a channel have the channels of that axis; others are not set yet."""
    channels = call.layouts("self")[call.dim(axis)]
    for name in names:
        layouts = call.layouts(name)
        if [size_of(layout) for layout in layouts] == [size_of(channels)]:
            call.unify(layouts[0], channels)
