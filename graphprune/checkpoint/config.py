"""The config.json of a slim checkpoint, where one can say its sizes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.errors import GraphPruneError, in_a_line, listed
from graphprune.forms import Slimmed
from graphprune.inference import Step, Value, infer
from graphprune.layout import size_of
from graphprune.pretrained import Place, fitting_changes, shapes, sizes_of, with_changes
from graphprune.state import named_tensors

_ATTENTION = "_attn_implementation"


def slim_config(
    config: Mapping[str, Any], model: nn.Module, result: Slimmed
) -> tuple[dict[str, Any] | None, str]:
    """Return a config with the sizes of the slim model, or None and why there is none.

    The class, built from it, has to have the slim model's shapes, to call the same operators with the same
    numbers, and to compute the same buffers as before.

    Args:
        config: what config.json says of the original.
        model: the original, without values.
        result: the slim model, without values.

    """
    own = getattr(model, "config", None)
    if not (hasattr(own, "to_dict") and hasattr(own, "from_dict")):
        return None, f"{type(model).__name__} has no config of transformers"
    if result.form != "module":
        return None, f"it is a graph: {result.why_graph}"
    wanted, before = shapes(result.model), shapes(model)
    odd = listed([name for name, shape in wanted.items() if shape != before.get(name)])
    why = f"no {type(own).__name__} says those of {odd}"
    for changes in fitting_changes(type(model), own, wanted):
        changed = _with_sizes(config, with_changes(own, changes), changes)
        try:
            rebuilt, original = _built(type(model), own, changed)
        except Exception as refusal:  # a config refuses some sizes in whatever way it likes
            why = in_a_line(refusal)
            continue
        if (
            shapes(rebuilt) == wanted
            and _same_buffers(rebuilt, original)
            and _same_operators(rebuilt, result)
        ):
            return changed, ""
    return None, why


def _with_sizes(
    config: Mapping[str, Any], changed: Any, changes: Mapping[Place, int]
) -> dict[str, Any]:
    """Return the config with the changes, and with the sizes that it leaves to be computed from others."""
    result = copy.deepcopy(dict(config))
    for path, size in (*sizes_of(changed), *changes.items()):
        owner = result
        for name in path[:-1]:
            owner = owner.setdefault(name, {})
        if size is not None and (path in changes or path[-1] not in owner):
            owner[path[-1]] = size
    return result


def _built(kind: Any, own: Any, config: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Return the model of a changed config, as it is read from a file, and that of the model's own."""
    read = type(own).from_dict(copy.deepcopy(dict(config)))
    if hasattr(own, _ATTENTION):  # is not written to the file
        setattr(read, _ATTENTION, getattr(own, _ATTENTION))
    with warnings.catch_warnings(), _UnfilledOnMeta(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return kind(read), kind(own)


class _UnfilledOnMeta(TorchFunctionMode):
    """Makes tensors that are to be filled later, as parameters are, without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _same_buffers(one: nn.Module, other: nn.Module) -> bool:
    """Say whether both compute the same tensors where no checkpoint holds them."""
    state = one.state_dict().keys()
    mine, its = (
        {name: tensor for name, tensor in named_tensors(each).items() if name not in state}
        for each in (one, other)
    )
    return mine.keys() == its.keys() and all(
        not (tensor.is_meta or its[name].is_meta) and torch.equal(tensor, its[name])
        for name, tensor in mine.items()
    )


def _same_operators(rebuilt: nn.Module, result: Slimmed) -> bool:
    """Say whether both call the same operators, on what comes from the same places, of the same sizes."""
    try:
        found, wanted = (infer(each, result.inputs).steps for each in (rebuilt, result.model))
    except GraphPruneError:
        return False
    return len(found) == len(wanted) and all(
        one.func is other.func and _described(one) == _described(other)
        for one, other in zip(found, wanted, strict=True)
    )


def _described(step: Step) -> Any:
    def describe(leaf: Any) -> Any:
        return (leaf.source, *map(size_of, leaf.layouts)) if isinstance(leaf, Value) else leaf

    return pytree.tree_map(describe, step.arguments, is_leaf=lambda leaf: isinstance(leaf, Value))
