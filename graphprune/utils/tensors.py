"""The tensors that a model holds, by name, and copies of a model with other tensors in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphprune.errors import CaptureError, InvalidRequestError, listed
from graphprune.utils.torch_context import silence_torch

if TYPE_CHECKING:
    from hashlib import _Hash as Hash


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, buffer and tensor attribute by its dotted name.

    A tensor that has several names (tied weights, a shared module) stands under each of them.

    Raises:
        InvalidRequestError: a lazy module has not seen its first input yet.

    """
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _own_tensors(module):
            tensors[f"{path}.{name}" if path else name] = tensor
    lazy = sorted(name for name, tensor in tensors.items() if is_lazy(tensor))
    if lazy:
        raise InvalidRequestError(
            f"{', '.join(lazy)} have no shape yet; run the model once on an example input first"
        )
    return tensors


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for attributes in (module._parameters, module._buffers, vars(module)):
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                yield name, value


# The types of an index; one of bytes is a mask. And no dimension whose slots have an order has more.
OF_AN_INDEX = {torch.int32, torch.int64}
_MOST_SLOTS = 65536


def may_be_an_order(tensor: Tensor) -> bool:
    """Say whether a tensor is whole numbers in a row, in which an order of slots may stand."""
    return tensor.dtype in OF_AN_INDEX and tensor.dim() == 1 and len(tensor) <= _MOST_SLOTS


def check_not_quantised(model: nn.Module) -> None:
    """See that no weights of a model are integers that its operators unpack, whose channels nobody can cut.

    Raises:
        InvalidRequestError: some are.

    """
    packed = [_owner(name) for name, module in model.named_modules() if _is_packed(module)]
    wrapped = [name for name, tensor in model.named_parameters() if _is_wrapped(tensor)]
    names = list(dict.fromkeys([*packed, *wrapped]))
    if names:
        raise InvalidRequestError(
            f"{listed(names)} {'hold' if len(names) > 1 else 'holds'} quantised weights, whose channels "
            "cannot be cut; slim the model first and quantise the slim one"
        )


def _owner(name: str) -> str:
    """Return the path of the module that a private part of one belongs to."""
    return f".{name}".partition("._")[0].removeprefix(".") or "the model"


def _is_packed(module: nn.Module) -> bool:
    """Say whether a module holds weights as an object of torch's quantised operators."""
    objects = (value for value in vars(module).values() if isinstance(value, torch.ScriptObject))
    names = (value._type().qualified_name() for value in objects)
    return any(".classes.quantized." in name or ".classes.rnn." in name for name in names)


def _is_wrapped(tensor: Tensor) -> bool:
    """Say whether a tensor is computed from others that it holds, as torchao's quantised ones are."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor")


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, tied ones under their first name only."""
    return dict(model.named_parameters())


def copy_with(model: nn.Module, replace: Callable[[str, Tensor], Tensor | None]) -> nn.Module:
    """Return a deep copy of the model in which `replace(name, tensor)` stands for every tensor.

    Where `replace` gives None the tensor is copied as it is. Each tensor is replaced once, under its
    first name, so that ties stay ties.

    Raises:
        CaptureError: the model cannot be copied.

    """
    # deepcopy takes what is in its memo for copied already, and puts it where the original was
    memo: dict[int, object] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in memo:
            replacement = replace(name, tensor)
            if replacement is not None:
                memo[id(tensor)] = _wrap_like(tensor, replacement)
    for tensor in _find_computed(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        with silence_torch() if isinstance(model, fx.GraphModule) else nullcontext():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied by copy.deepcopy, and graphprune never changes "
            f"the model it was given: {error}"
        ) from error


def _find_computed(model: nn.Module) -> Iterator[Tensor]:
    """Yield tensors that a module holds and computed from others: old-style masks, kept results.

    Python refuses to copy them, since their history would be lost.
    """
    for module in model.modules():
        for leaf in pytree.tree_leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                yield leaf


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy that holds the same parameters, and buffers and attributes of its own.

    Running a model may write to its buffers (counters, caches), never to its parameters.
    """
    return copy_with(model, lambda _, tensor: tensor if isinstance(tensor, nn.Parameter) else None)


@contextmanager
def restore_training_flags(model: nn.Module) -> Iterator[None]:
    """Give every module its own training flag back in the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Hold every module in evaluation mode, then give each its own flag back."""
    # Not by eval(): the modules of exported programs refuse it, and some classes override it.
    with restore_training_flags(model):
        for module in model.modules():
            module.training = False
        yield


def forget_derived(model: nn.Module) -> None:
    """Let modules that keep results of their parameters in `eval()` or `train()` drop those of a copy."""
    with restore_training_flags(model):
        model.train(model.training)


def _wrap_like(original: Tensor, replacement: Tensor) -> Tensor:
    """Return the value as a parameter if the original is one, with the attributes users gave it."""
    if not isinstance(original, nn.Parameter) or isinstance(replacement, nn.Parameter):
        return replacement
    trains = original.requires_grad and (
        replacement.is_floating_point() or replacement.is_complex()
    )
    parameter = nn.Parameter(replacement.detach(), requires_grad=trains)
    parameter.__dict__.update(original.__dict__)
    return parameter


def digest(hasher: Hash, name: str, tensor: Tensor) -> None:
    """Let a hash see a tensor: its name, dtype, shape and values."""
    # as bytes, since numpy has no bfloat16
    values: npt.NDArray[Any] = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    hasher.update(values.tobytes())


def double_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of double precision for a floating-point or complex one, any other as it is."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def as_double(tensor: Tensor) -> Tensor:
    """Return a floating-point or complex tensor in double precision, any other as it is."""
    dtype = double_of(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def double_copy(tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory with the tensor, in double precision as `as_double` has it."""
    return tensor.detach().to(double_of(tensor.dtype), copy=True)
