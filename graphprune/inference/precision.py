"""In which types a model is run to be analysed and compared: in float64 wherever that works.

What has no float64 kernel runs on rounded copies of its tensors; a model that does not run on float64
tensors at all runs in its own types. Either is noted, since it decides how nearly two runs can agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload

from graphprune.utils.tensors import as_double, double_copy, double_of

# Two computations of the same thing in another order of summation differ by about 1e-15 (float64)
# for each operator in a row, by 1e-7 (float32), 1e-3 (float16) or 8e-3 (bfloat16); a wrong slot
# differs by far more than these parts of the largest value.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 5e-3}
_COARSE_TOLERANCE = 3e-2  # bfloat16, and what is coarser


@dataclass
class Precision:
    """How precisely a model is run, and what turned out to run in less than float64.

    Attributes:
        double: whether tensors are held in float64; in the model's own types if not.
        operators: by name, the coarsest type that an operator computed in where that is not float64.

    """

    double: bool = True
    operators: dict[str, torch.dtype] = field(default_factory=dict)

    def type_of(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which values of a type are held."""
        return double_of(dtype) if self.double else dtype

    def convert(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the type in which it is held."""
        return as_double(tensor) if self.double else tensor

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy that shares no memory with the tensor, in the type in which it is held."""
        return double_copy(tensor) if self.double else tensor.detach().clone()

    def note(self, func: OpOverload, dtype: torch.dtype) -> None:
        """Note that an operator computed in this type, unless that is float64 or no fraction."""
        if dtype.is_complex:
            dtype = dtype.to_real()
        if dtype.is_floating_point and dtype != torch.float64:
            name = func._schema.name.replace("::", ".")
            self.operators[name] = _choose_coarser(dtype, self.operators.get(name, dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest type that something was computed in."""
        coarsest_dtype = torch.float64
        for dtype in self.operators.values():
            coarsest_dtype = _choose_coarser(dtype, coarsest_dtype)
        return coarsest_dtype

    @property
    def tolerance(self) -> float:
        """By which part of the largest value two computations of the same thing may differ."""
        return tolerance_of(self.dtype)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return by which part of the largest value two computations in a type may differ."""
    return _TOLERANCES.get(dtype, _COARSE_TOLERANCE)


def find_coarsest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating-point type of the least precision among the tensors; float32 if that is wider.

    Wider ones do not count: what a tracer or a runtime makes of a model computes in float32 at places.
    """
    coarsest_dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            coarsest_dtype = _choose_coarser(tensor.dtype, coarsest_dtype)
    return coarsest_dtype


def _choose_coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return max|a - b| / max|a|; equal infinities agree, and so do NaNs at the same places."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    # `inf - inf` is NaN, so what is equal is left out before anything is subtracted.
    differs = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not differs.any():
        return 0.0
    # `initial` keeps the quotient finite where `a` is all zeros.
    largest = np.abs(x[np.isfinite(x)]).max(initial=1e-12)
    return float((np.abs(x[differs] - y[differs]) / largest).max())
