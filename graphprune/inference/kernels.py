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
FALLBACK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_doubles(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether float64 tensors are among the arguments."""
    return any(tensor.dtype == torch.float64 for tensor in tensors_in((*args, *kwargs.values())))


# How torch's own operators say that they do not take a type.
_TYPE_COMPLAINT = re.compile("double|float64|scalar type|dtype", re.IGNORECASE)


def may_lack_doubles(func: OpOverload, failure: Exception) -> bool:
    """Say whether an operator that failed on float64 tensors may do so because of their type.

    Torch's own say so. Others must not be tried in another type: in float32 some kernels (oneDNN's of
    LSTM) do not look whether sizes fit together.
    """
    if func.is_view:
        return False
    is_about_type = isinstance(failure, NotImplementedError) or _TYPE_COMPLAINT.search(str(failure))
    return func.namespace != "aten" or bool(is_about_type)


def run_rounded(
    func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], dtype: torch.dtype
) -> Any:
    """Return what the operator gives on copies of its float64 tensors in another type.

    What it writes to its arguments is written back to them.
    """
    # By id, so that an operand that is given twice stays
    # one tensor; the original is kept alive with it.
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def round_tensor(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float64:
            return tensor
        return copies.setdefault(id(tensor), (tensor, tensor.to(dtype)))[1]

    copied_args, copied_kwargs = pytree.tree_map_only(Tensor, round_tensor, (args, kwargs))
    result = run(func, copied_args, copied_kwargs)
    arguments = bind_arguments(func, args, kwargs)
    written = (
        arguments[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    )
    for tensor in tensors_in(written):
        if id(tensor) in copies:
            tensor.copy_(copies[id(tensor)][1])
    # An operator that writes returns the tensor that it wrote: the caller's, not the copy of it.
    originals = {id(copy): tensor for tensor, copy in copies.values()}
    return pytree.tree_map_only(Tensor, lambda tensor: originals.get(id(tensor), tensor), result)


def _run_recurrent(func: OpOverload, arguments: dict[str, Any]) -> Any:
    """Without data, torch takes a recurrent operator apart into every step; one step has its shapes."""
    values = list(arguments.values())
    if not isinstance(values[0], FakeTensor):
        return func(*values)
    if "batch_sizes" in arguments:
        raise NotImplementedError(f"{func} on tensors without data: lengths of sequences are data")
    time_dim = 1 if arguments["batch_first"] else 0
    with values[0].fake_mode:
        output, *states = func(values[0].narrow(time_dim, 0, 1), *values[1:])
    sizes = list(output.shape)
    sizes[time_dim] = values[0].shape[time_dim]
    return output.new_empty(sizes), *states


def _multiply_groups(func: OpOverload, arguments: dict[str, Any]) -> Tensor:
    """Multiply each group of rows by a matrix of its own; torch's kernel does so up to float32."""
    left, right, offsets = arguments["self"], arguments["mat2"], arguments["offs"]
    if offsets is None:
        result = torch.bmm(left, right)
    elif isinstance(left, FakeTensor):
        group_dims = [offsets.shape[0]] if left.dim() == right.dim() == 2 else []
        result = left.new_empty([*group_dims, left.shape[-2], right.shape[-1]])
    else:
        result = _multiply_spans(left, right, offsets.tolist())
    return result if arguments["bias"] is None else result + arguments["bias"]


def _multiply_spans(left: Tensor, right: Tensor, ends: list[int]) -> Tensor:
    """Return the product of ragged groups: rows of `left`, columns of `right`, or what is summed."""
    spans = list(zip([0, *ends], ends, strict=False))
    # `ends` are where the groups end along the ragged dimension: `[2, 5]` is rows 0-1 and rows 2-4.
    if left.dim() == 2 and right.dim() == 2:
        return torch.stack([left[:, start:end] @ right[start:end] for start, end in spans])
    if left.dim() == 2:
        products = [left[start:end] @ right[group] for group, (start, end) in enumerate(spans)]
        # Rows behind the last group belong to none and come out as zeros.
        zeros = left.new_zeros(left.shape[0] - ends[-1], right.shape[-1])
        return torch.cat([*products, zeros])
    products = [left[group] @ right[:, start:end] for group, (start, end) in enumerate(spans)]
    zeros = left.new_zeros(left.shape[-2], right.shape[-1] - ends[-1])
    return torch.cat([*products, zeros], dim=-1)


_KERNELS: dict[Any, Callable[[OpOverload, dict[str, Any]], Any]] = {
    **dict.fromkeys(GATES, _run_recurrent),
    aten._grouped_mm: _multiply_groups,
}
