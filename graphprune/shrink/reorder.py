"""The channels of a model in another order; what makes and what reads them agrees, so all else stays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from graphprune.inference.recorded import Inference
from graphprune.layout import Axis, Concat, Layout, Permuted, inverse_of, resolve, size_of
from graphprune.masks import touches
from graphprune.utils.tensors import copy_with

Order = npt.NDArray[np.int64]


def reorder_slots(
    model: nn.Module, inference: Inference, orders: Mapping[Axis, Order]
) -> nn.Module:
    """Return a copy of a model with the slots of some axes in another order.

    Args:
        model: whose tensors hold the slots.
        inference: of that model.
        orders: by axis, the old slot that each new one is; axes that are fixed keep theirs.

    """

    def reorder_tensor(name: str, tensor: Tensor) -> Tensor | None:
        reordered_tensor = tensor.detach()
        if name in inference.addressed:  # an order of slots, whichever these are
            return None
        for dim, layout in enumerate(inference.parameters.get(name, [])):
            if touches(layout, orders):
                index = torch.from_numpy(old_positions(layout, orders)).to(tensor.device)
                reordered_tensor = reordered_tensor.index_select(dim, index)
        return None if reordered_tensor.data_ptr() == tensor.data_ptr() else reordered_tensor

    return copy_with(model, reorder_tensor)


def old_positions(layout: Layout, orders: Mapping[Axis, Order]) -> Order:
    """Return the old position that each new position of a dimension is."""
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return orders[layout] if layout in orders else np.arange(layout.size)
    if isinstance(layout, Concat):
        starts = np.cumsum([0, *map(size_of, layout.parts)])
        parts = [old_positions(p, orders) + s for p, s in zip(layout.parts, starts, strict=False)]
        return np.concatenate(parts)
    if isinstance(layout, Permuted):
        # Position i is `order[i]` of the inner layout: into its numbers, to the old one, and back.
        inverse = np.array(inverse_of(layout.order))
        return inverse[old_positions(layout.inner, orders)[list(layout.order)]]
    # Row-major: (2 3) with its two outer slots swapped is [3, 4, 5, 0, 1, 2].
    positions = np.zeros(1, dtype=np.int64)
    for factor in layout.factors:
        positions = (positions[:, None] * size_of(factor) + old_positions(factor, orders)).flatten()
    return positions
