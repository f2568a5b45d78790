"""Models as torch.distributed wraps them: the model inside, whole, and a slim one wrapped alike."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from graphprune.errors import InvalidRequestError

# Under names that begin so, a module remembers what was done to it.
_NOTES = "__composable_api_state_key"
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without DistributedDataParallel, or a whole copy of one that is fully sharded.

    A sharded model's tensors are gathered, so that every process of its mesh has to call this.

    Raises:
        InvalidRequestError: the model is wrapped or split in another way.

    """
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    sharded = dict(_find_sharded(model))
    for name, module in model.named_modules():
        if _is_of_class(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise InvalidRequestError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, whose parameters have no "
                "names of their own; use torch.distributed.fsdp.fully_shard, or pass the model without it"
            )
        split = next((n for n, p in module.named_parameters(recurse=False) if _is_split(p)), "")
        if split and not sharded:
            raise InvalidRequestError(
                f"{f'{name}.{split}' if name else split} is split over processes by something else than "
                "fully_shard; pass the model before it was parallelised"
            )
    return _whole_copy(model, sharded) if sharded else model


def wrapped_like(slimmer: nn.Module, original: nn.Module) -> nn.Module:
    """Return a slim model wrapped as its original is: in DistributedDataParallel or by `fully_shard`.

    A model that is sharded is changed in place, as `fully_shard` does; the same modules are sharded
    together, along their parameters' first dimension.

    Args:
        slimmer: what `slim` made of the original, in its own class.
        original: a model in DistributedDataParallel, or one that `fully_shard` was called on.

    Raises:
        InvalidRequestError: the original is not wrapped, or the slim model lacks one of its modules.

    """
    if isinstance(original, DistributedDataParallel):
        options: dict[str, Any] = {} if original.broadcast_buffers else {"broadcast_buffers": False}
        return DistributedDataParallel(
            slimmer,
            device_ids=original.device_ids,
            output_device=original.output_device,
            dim=original.dim,
            **options,
            find_unused_parameters=original.find_unused_parameters,
            gradient_as_bucket_view=original.gradient_as_bucket_view,
            static_graph=original.static_graph,
        )
    states = dict(_find_sharded(original))
    if not states:
        raise InvalidRequestError(
            f"{type(original).__name__} is neither in DistributedDataParallel nor sharded by fully_shard, "
            "so there is nothing to wrap alike"
        )
    names = {module: name for name, module in original.named_modules()}
    slim_modules = dict(slimmer.named_modules())
    shard_names = [names[module] for module in states if names[module]]
    lacking = [
        part
        for part in shard_names
        if part not in slim_modules or isinstance(slimmer, fx.GraphModule)
    ]
    if lacking:
        raise InvalidRequestError(
            f"the slim model has no module {lacking[0]!r} to shard as the original's is; slim it with "
            "form='module', or call fully_shard yourself"
        )
    from torch.distributed.fsdp import fully_shard

    # Modules that are sharded together share a state. Inner ones first, as fully_shard wants it.
    for state in reversed(list(dict.fromkeys(states.values()))):
        group = state._fsdp_param_group
        # By itself fully_shard decides by whether the module is the outermost, which None asks for.
        automatic = state._auto_reshard_after_forward
        modules = [slim_modules[names[module]] for module in state._modules]
        options = {} if group is None else {
            "mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy,
            "reshard_after_forward": None if automatic else group.post_forward_mesh_info is not None,
        }  # fmt: skip
        fully_shard(
            modules if len(modules) > 1 else modules[0], mp_policy=state._mp_policy, **options
        )
    return slimmer


def _is_of_class(value: Any, module: str, name: str) -> bool:
    """Say whether a value is of a class that would have to be imported to make one."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _is_split(tensor: Tensor) -> bool:
    return _is_of_class(tensor, "torch.distributed.tensor", "DTensor")


def _find_sharded(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the modules that `fully_shard` was called on, and the state that it gave them."""
    for module in model.modules():
        if _is_of_class(module, "torch.distributed.fsdp", "FSDPModule"):
            yield module, module._get_fsdp_state()  # type: ignore[operator]


def _whole_copy(model: nn.Module, sharded: dict[nn.Module, Any]) -> nn.Module:
    """Return a copy with whole tensors, of the classes that the modules had."""
    # What deepcopy takes instead: blanks for the states, which hold process groups; whole tensors.
    memo: dict[int, Any] = {id(state): SimpleNamespace() for state in sharded.values()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if _is_split(tensor):
            full_tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
            if isinstance(tensor, nn.Parameter):
                full_tensor = nn.Parameter(full_tensor, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = full_tensor
    with _use_unsharded_classes(sharded):
        unsharded_model: nn.Module = copy.deepcopy(model, memo)
    # The copy has the hooks too, which would gather parameters that are whole.
    hooks = {number for state in sharded.values() for number in _find_hooks(state)}
    for module in unsharded_model.modules():
        for name in _HOOKS:
            module_hooks = getattr(module, name, {})
            for number in hooks.intersection(module_hooks):
                del module_hooks[number]
        for name in [n for n in vars(module) if n.startswith(_NOTES)]:
            delattr(module, name)
    return unsharded_model


@contextmanager
def _use_unsharded_classes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold modules in the classes that they had before they were sharded, which can be copied."""
    sharded_classes = {module: type(module) for module in modules}
    try:
        for module, kind in sharded_classes.items():
            # fully_shard derives the class from FSDPModule and the module's: new, FSDPModule, old.
            module.__class__ = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
        yield
    finally:
        for module, kind in sharded_classes.items():
            module.__class__ = kind


def _find_hooks(state: Any) -> Iterator[int]:
    """Yield the numbers of the hooks by which a sharded module gathers its parameters."""
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    if state._fsdp_param_group is not None:
        handles += state._fsdp_param_group._module_to_pre_save_state_dict_hook_handle.values()
        handles += state._fsdp_param_group._module_to_pre_load_state_dict_hook_handle.values()
    for handle in handles:
        for single_handle in getattr(handle, "handles", (handle,)):
            yield single_handle.id
