"""How far two correct computations of one model may differ, by the precision of its numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative to an output's largest value: about five roundings. For wider types see `TOLERANCE`."""

TOLERANCE = 1e-4


def coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating-point type of the least precision among the tensors, float32 if that is wider."""
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(types & TOLERANCES.keys(), key=TOLERANCES.__getitem__, default=torch.float32)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the tolerance for models of that type."""
    return TOLERANCES.get(dtype, TOLERANCE)
