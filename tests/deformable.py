"""Torchvision's deformable convolution, or where that cannot be loaded, one that computes the same."""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

_SCHEMA = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
    "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
)
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


@cache
def deformable_convolution() -> OpOverload:
    """Return the operator, declared here where torchvision does not bring it."""
    with suppress(Exception):  # torchvision's own errors where it does not fit torch
        importlib.import_module("torchvision")
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        _LIBRARY.define(_SCHEMA)
        _LIBRARY.impl("deform_conv2d", _deformed, "CPU")
        _LIBRARY.impl("deform_conv2d", _without_data, "Meta")
    return torch.ops.torchvision.deform_conv2d.default


def _without_data(data: Tensor, weight: Tensor, offset: Tensor, *_: Any) -> Tensor:
    return data.new_empty(data.shape[0], weight.shape[0], *offset.shape[2:])


def _deformed(
    data: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor,
    stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
    groups: int, offset_groups: int, use_mask: bool,
) -> Tensor:  # fmt: skip
    batch, _, height, width = data.shape
    rows, columns = weight.shape[2:]
    space, window = offset.shape[2:], rows * columns
    shifts = offset.view(batch, offset_groups, window, 2, *space)
    weights = mask.view(batch, offset_groups, window, *space) if use_mask else None
    y, x = torch.meshgrid(*(torch.arange(size).to(data) for size in space), indexing="ij")
    sampled = []
    for place in range(window):
        down = y * stride_h - pad_h + place // columns * dilation_h
        right = x * stride_w - pad_w + place % columns * dilation_w
        parts = []
        for group, part in enumerate(data.chunk(offset_groups, 1)):
            at_y, at_x = down + shifts[:, group, place, 0], right + shifts[:, group, place, 1]
            grid = torch.stack((2 * at_x / (width - 1) - 1, 2 * at_y / (height - 1) - 1), -1)
            values = F.grid_sample(part, grid, align_corners=True)
            parts.append(values if weights is None else values * weights[:, group, place, None])
        sampled.append(torch.cat(parts, 1))
    matrix = weight.view(groups, weight.shape[0] // groups, -1)
    features = torch.stack(sampled, 2).view(batch, groups, matrix.shape[2], -1)
    result = torch.einsum("gof,bgfp->bgop", matrix, features).reshape(batch, -1, *space)
    return result + bias.view(1, -1, 1, 1)
