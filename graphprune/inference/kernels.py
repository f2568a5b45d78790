"""How operators are called in an interpretation: on tensors without data too, and in float64.

Torch's own kernels do nearly all of it; here is what they cannot do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from graphprune.rules import bind_arguments, tensors_in
from graphprune.rules.recurrent import GATES

aten = torch.ops.aten


def run(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what the operator gives.

    Raises:
        NotImplementedError: it cannot be called on tensors without data.

    """
    kernel = _KERNELS.get(func.overloadpacket)
    if kernel is None:
        return func(*args, **kwargs)
    return kernel(func, bind_arguments(func, args, kwargs))


# Tried in turn for an operator that has no float64 kernel.
ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


def takes_doubles(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether float64 tensors are among the arguments."""
    return any(tensor.dtype == torch.float64 for tensor in tensors_in((*args, *kwargs.values())))


# How torch's own operators say that they do not take a type.
_OF_A_TYPE = re.compile("double|float64|scalar type|dtype", re.IGNORECASE)


def may_lack_doubles(func: OpOverload, failure: Exception) -> bool:
    """Say whether an operator that failed on float64 tensors may do so because of their type.

    Torch's own say so. Others must not be tried in another type: in float32 some kernels (oneDNN's of
    LSTM) do not look whether sizes fit together.
    """
    if func.is_view:
        return False
    of_a_type = isinstance(failure, NotImplementedError) or _OF_A_TYPE.search(str(failure))
    return func.namespace != "aten" or bool(of_a_type)


def run_rounded(
    func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], dtype: torch.dtype
) -> Any:
    """Return what the operator gives on copies of its float64 tensors in another type.

    What it writes to its arguments is written back to them.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def rounded(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float64:
            return tensor
        return copies.setdefault(id(tensor), (tensor, tensor.to(dtype)))[1]

    copied_args, copied_kwargs = pytree.tree_map_only(Tensor, rounded, (args, kwargs))
    result = run(func, copied_args, copied_kwargs)
    bound = bind_arguments(func, args, kwargs)
    written = (
        bound[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write
    )
    for tensor in tensors_in(written):
        if id(tensor) in copies:
            tensor.copy_(copies[id(tensor)][1])
    originals = {id(copy): tensor for tensor, copy in copies.values()}
    return pytree.tree_map_only(Tensor, lambda tensor: originals.get(id(tensor), tensor), result)


def _recurrent(func: OpOverload, given: dict[str, Any]) -> Any:
    """Without data, torch takes a recurrent operator apart into every step; one step has its shapes."""
    values = list(given.values())
    if not isinstance(values[0], FakeTensor):
        return func(*values)
    if "batch_sizes" in given:
        raise NotImplementedError(f"{func} on tensors without data: lengths of sequences are data")
    time = 1 if given["batch_first"] else 0
    with values[0].fake_mode:
        output, *states = func(values[0].narrow(time, 0, 1), *values[1:])
    sizes = list(output.shape)
    sizes[time] = values[0].shape[time]
    return output.new_empty(sizes), *states


def _grouped_mm(func: OpOverload, given: dict[str, Any]) -> Tensor:
    """Multiply each group of rows by a matrix of its own; torch's kernel does so up to float32."""
    a, b, offsets = given["self"], given["mat2"], given["offs"]
    if offsets is None:
        result = torch.bmm(a, b)
    elif isinstance(a, FakeTensor):
        groups = [offsets.shape[0]] if a.dim() == b.dim() == 2 else []
        result = a.new_empty([*groups, a.shape[-2], b.shape[-1]])
    else:
        result = _by_group(a, b, offsets.tolist())
    return result if given["bias"] is None else result + given["bias"]


def _by_group(a: Tensor, b: Tensor, ends: list[int]) -> Tensor:
    """Return the product of ragged groups: of rows of `a`, of columns of `b`, or of what is summed."""
    spans = list(zip([0, *ends], ends, strict=False))
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    if a.dim() == 2:
        parts = [a[start:end] @ b[group] for group, (start, end) in enumerate(spans)]
        rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])
        return torch.cat([*parts, rest])
    parts = [a[group] @ b[:, start:end] for group, (start, end) in enumerate(spans)]
    rest = a.new_zeros(a.shape[-2], b.shape[-1] - ends[-1])
    return torch.cat([*parts, rest], dim=-1)


_KERNELS: dict[Any, Callable[[OpOverload, dict[str, Any]], Any]] = {
    **dict.fromkeys(GATES, _recurrent),
    aten._grouped_mm: _grouped_mm,
}
