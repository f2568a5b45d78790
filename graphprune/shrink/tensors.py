"""A smaller copy of a model: its parameters and buffers sliced, its attributes made true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graphprune.inference.orders import renumber
from graphprune.inference.recorded import Inference
from graphprune.layout import Axis, Layout
from graphprune.masks import Mask, count_kept_slots, mask_of
from graphprune.shrink.module_attributes import describe_tensors
from graphprune.utils.tensors import copy_with, evaluation_mode


def shrink_module(model: nn.Module, inference: Inference, masks: Mapping[Axis, Mask]) -> nn.Module:
    """Return a copy of the model whose tensors lack the removed slots, ties kept.

    The forward code is the model's own; `graphprune.shrink.graph_literals` rewrites a graph's.
    """

    def cut_and_renumber(name: str, tensor: Tensor) -> Tensor | None:
        smaller_tensor = slice_tensor(tensor, inference.parameters.get(name, []), masks)
        if smaller_tensor is None or name not in inference.addressed:
            return smaller_tensor
        return renumber(smaller_tensor, mask_of(inference.addressed[name], masks))

    slimmer = copy_with(model, cut_and_renumber)
    kept = count_kept_slots(masks)
    with evaluation_mode(slimmer):  # reading a weight computed in training may update its buffers
        describe_tensors(slimmer, inference, kept)
    return slimmer


def slice_tensor(
    tensor: Tensor, layouts: list[Layout], masks: Mapping[Axis, Mask]
) -> Tensor | None:
    """Return the tensor without the removed slots, or None if it loses none."""
    masks_by_dim = [mask_of(layout, masks) for layout in layouts]
    return (
        None if all(mask.all() for mask in masks_by_dim) else keep_positions(tensor, masks_by_dim)
    )


def keep_positions(tensor: Tensor, kept: Sequence[Mask]) -> Tensor:
    """Return what is kept of a tensor, given which positions stay along each dimension.

    It lies in memory as the tensor does: its dimensions in the same order, as in channels_last.
    """
    kept_tensor = tensor.detach()
    for dim, mask in enumerate(kept):
        if not mask.all():
            index = torch.from_numpy(mask.nonzero()[0]).to(tensor.device)
            kept_tensor = kept_tensor.index_select(dim, index)
    if tensor.layout is not torch.strided:
        return kept_tensor
    strides = tensor.stride()
    # An image in channels_last, `[batch, channels, height, width]`, has the order 0, 2, 3, 1: laid
    # out contiguous in that order and turned back, it lies as before.
    outermost_first = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    inverse = [outermost_first.index(dim) for dim in range(tensor.dim())]
    return kept_tensor.permute(outermost_first).contiguous().permute(inverse)
