"""Slim transformers models whose config says their sizes, and folders of them for `from_pretrained`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError, warn
from graphprune.report.result import Slimmed
from graphprune.shrink.ties import AmbiguousSize
from graphprune.transformers_config.configs import has_config, tensors_of
from graphprune.transformers_config.fitting import find
from graphprune.transformers_config.unfitting import why_none
from graphprune.utils.atomic_files import draft_folder
from graphprune.utils.inputs import call, output_tensors
from graphprune.utils.tensors import evaluation_mode

_TOLERANCE = 1e-4

# For an attribute that a config had not; None is a number left open.
_ABSENT = object()

# What an earlier model may have left in the folder, and another one's config would not fit.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def fit_own_config(result: Slimmed) -> Slimmed:
    """Let the config of a slim transformers model, in place, say its sizes, if one can.

    Its layers share the config, and what its class's own methods make of it (caches, folders for
    `from_pretrained`) fits the slim model then. Where no config can, it stays, with a warning.

    Returns:
        The result, whose ambiguous sizes name the config's numbers that had to stay.

    """
    model: Any = result.model
    lacks_values = any(tensor.is_meta for tensor in tensors_of(model).values())
    if result.form != "module" or not has_config(model) or not result.plan.removed or lacks_values:
        return result
    try:
        fit = find(result)
    except InvalidRequestError:  # from_pretrained could not build the original either
        return result
    if fit.model is not None and _takes_numbers_of(model, fit.model, result):
        return result
    warn(
        f"the config of the slim {type(model).__name__} still says the sizes of the original, since none "
        "can say all of its own: what its save_pretrained writes cannot be loaded; use graphprune.save, or "
        "leave whole the groups that graphprune.save_pretrained names"
    )
    stale = tuple(
        AmbiguousSize(
            ".".join(map(str, ("config", *path))), value, tuple(sorted({value, *successors}))
        )
        for path, value in fit.search.architecture.numbers.items()
        if isinstance(value, int) and (successors := fit.search.numbers.became.get(value))
    )
    return replace(result, ambiguous_sizes=result.ambiguous_sizes + stale)


def _takes_numbers_of(model: nn.Module, rebuilt: nn.Module, result: Slimmed) -> bool:
    """Put the numbers of the configs of a rebuilt model into a model's, if it computes the same then."""
    expected_outputs = _outputs(model, result)
    rebuilt_modules, modules = dict(rebuilt.named_modules()), dict(model.named_modules())
    changes = [
        change
        # Not the model's config alone: an encoder inside may have one of its own, or a copy.
        for path, module in modules.items()
        if hasattr(module, "config") and hasattr(rebuilt_modules.get(path), "config")
        for change in _other_numbers(module.config, rebuilt_modules[path].config)
    ]
    previous_values = [
        (config, name, vars(config).get(name, _ABSENT)) for config, name, _ in changes
    ]
    for config, name, value in changes:
        setattr(config, name, value)
    try:
        if _are_alike(_outputs(model, result), expected_outputs):
            return True
    except Exception:  # the code refuses numbers in whatever way it likes
        pass
    for config, name, value in previous_values:
        if value is _ABSENT:
            delattr(config, name)
        else:
            setattr(config, name, value)
    return False


def _other_numbers(config: Any, twin: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield where a config, or one in it, says another number than its twin, and that number."""
    for name, value in vars(twin).items():
        current = vars(config).get(name)
        if hasattr(value, "to_dict") and current is not None:
            yield from _other_numbers(current, value)
        elif _is_of_numbers(value) and current != value and not name.startswith("_"):
            yield config, name, copy.deepcopy(value)


def _is_of_numbers(value: Any) -> bool:
    """Say whether a value of a config is a number, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_of_numbers, value))
    return type(value) in (int, float)


def save_pretrained(result: Slimmed, folder: str | Path) -> None:
    """Write a slim transformers model so that its class's `from_pretrained` reads it again.

    Which numbers of the config have to change is found by building the model from changed ones, without
    memory for its weights: as it is read from config.json it has to have the slim model's shapes, to call
    the same operators with the same numbers, and to give what the slim model gives. A tokenizer is for you
    to save beside it.

    Args:
        result: what `graphprune.slimmed` returned for a transformers model, in module form.
        folder: where `save_pretrained` of the model writes config and weights.

    Raises:
        InvalidRequestError: the model is no transformers model in module form, or no config of its kind
            says its sizes: widths that differ from layer to layer, or fewer heads where the code computes
            the size of a head from their number.

    """
    model: Any = result.model
    if result.form != "module":
        raise InvalidRequestError(
            f"the slim model is a graph, which no config builds: {result.why_graph}; use graphprune.save"
        )
    if not (has_config(model) and hasattr(model, "save_pretrained")):
        raise InvalidRequestError(
            f"{type(model).__name__} has no config and no save_pretrained of transformers; use "
            "graphprune.save"
        )
    fit = find(result)
    if fit.model is None:
        raise InvalidRequestError(f"{why_none(fit)}, or use graphprune.save, which needs no config")
    rebuilt: Any = fit.model
    if not _gives_the_same(rebuilt, model, result):
        raise InvalidRequestError(
            f"{type(model).__name__} built from a config of the slim model's sizes gives other values than "
            "the slim model: its code computes something from the config that no operator shows; use "
            "graphprune.save"
        )
    if hasattr(model, "generation_config"):
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    with draft_folder(Path(folder), _WEIGHTS, last="config.json") as draft:
        rebuilt.save_pretrained(draft)


def _gives_the_same(rebuilt: nn.Module, model: nn.Module, result: Slimmed) -> bool:
    slim_tensors = tensors_of(model)
    for name, tensor in tensors_of(rebuilt).items():
        # In place, as this is the model that gets saved, in the slim model's precision.
        tensor.data = tensor.data.to(slim_tensors[name].device, slim_tensors[name].dtype)
    return _are_alike(_outputs(rebuilt, result), _outputs(model, result))


def _outputs(model: nn.Module, result: Slimmed) -> list[Tensor]:
    """Return what a model gives in evaluation for the inputs that a result was found with."""
    with evaluation_mode(model), torch.no_grad():
        return [tensor for _, tensor in output_tensors(call(model, result.inputs))]


def _are_alike(outputs: Sequence[Tensor], expected_outputs: Sequence[Tensor]) -> bool:
    return len(outputs) == len(expected_outputs) and all(
        a.shape == b.shape
        # Relative to each value, and to the largest: near zero a sum keeps only that accuracy.
        and torch.allclose(a, b, _TOLERANCE, _TOLERANCE * float(b.abs().max()), equal_nan=True)
        for a, b in zip(outputs, expected_outputs, strict=True)
    )
