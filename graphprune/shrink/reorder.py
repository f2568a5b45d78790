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


def reordered(model: nn.Module, inference: Inference, orders: Mapping[Axis, Order]) -> nn.Module:
    """Return a copy of a model with the slots of some axes in another order.

    Args:
        model: whose tensors hold the slots.
        inference: of that model.
        orders: by axis, the old slot that each new one is; axes that are fixed keep theirs.

    """

    def ordered(name: str, tensor: Tensor) -> Tensor | None:
        result = tensor.detach()
        if name in inference.addressed:  # an order of slots, whichever these are
            return None
        for dim, layout in enumerate(inference.parameters.get(name, [])):
            if touches(layout, orders):
                index = torch.from_numpy(positions(layout, orders)).to(tensor.device)
                result = result.index_select(dim, index)
        return None if result.data_ptr() == tensor.data_ptr() else result

    return copy_with(model, ordered)


def positions(layout: Layout, orders: Mapping[Axis, Order]) -> Order:
    """Return the old position that each new position of a dimension is."""
    layout = resolve(layout)
    if isinstance(layout, Axis):
        return orders[layout] if layout in orders else np.arange(layout.size)
    if isinstance(layout, Concat):
        starts = np.cumsum([0, *map(size_of, layout.parts)])
        parts = [positions(p, orders) + s for p, s in zip(layout.parts, starts, strict=False)]
        return np.concatenate(parts)
    if isinstance(layout, Permuted):
        back = np.array(inverse_of(layout.order))
        return back[positions(layout.inner, orders)[list(layout.order)]]
    found = np.zeros(1, dtype=np.int64)
    for factor in layout.factors:
        found = (found[:, None] * size_of(factor) + positions(factor, orders)).flatten()
    return found
