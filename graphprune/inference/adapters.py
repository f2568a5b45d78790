"""Adapters as peft puts them into a model: what their configuration says of their tensors stays true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from graphprune.layout import Layout, Reason, fix, leaves

WHY_ADAPTER_RANK = "the rank of an adapter, which its configuration says too"


def fix_ranks(
    model: nn.Module,
    parameters: Mapping[str, Sequence[Layout]],
    names: Mapping[str, Sequence[str]],
) -> None:
    """Fix the axes that only tensors of adapters have: the ranks of LoRA and its kin.

    An adapter is saved alone, with a configuration that says its rank; cut to another one it could not
    be loaded again. What it shares with the layer that it adapts is cut with that.

    Args:
        model: the model; its adapters say by `adapter_layer_names` which attributes hold tensors.
        parameters: layouts of its tensors by their first names.
        names: all names of each tensor by the first.

    """
    holders = tuple(_find_holders(model))
    if not holders:
        return
    adapter_names = {
        first_name
        for first_name in parameters
        if any(_is_under(name, holders) for name in names[first_name])
    }
    outside_axes = {
        axis
        for first_name in parameters.keys() - adapter_names
        for layout in parameters[first_name]
        for axis in leaves(layout)
    }
    for first_name in sorted(adapter_names):
        for layout in parameters[first_name]:
            for axis in leaves(layout):
                if axis not in outside_axes:
                    fix(axis, Reason(WHY_ADAPTER_RANK, first_name))


def _find_holders(model: nn.Module) -> Iterator[str]:
    """Yield the dotted names of the attributes that hold adapters' tensors."""
    for path, module in model.named_modules():
        for name in getattr(type(module), "adapter_layer_names", ()):
            yield f"{path}.{name}" if path else name


def _is_under(name: str, holders: Sequence[str]) -> bool:
    return any(name == holder or name.startswith(f"{holder}.") for holder in holders)
