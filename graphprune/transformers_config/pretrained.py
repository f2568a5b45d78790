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
from graphprune.utils.atomic_files import drafted_folder
from graphprune.utils.inputs import call, output_tensors
from graphprune.utils.tensors import evaluating

_TOLERANCE = 1e-4

_ABSENT = object()

# What an earlier model may have left in the folder, and another one's config would not fit.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def with_own_config(result: Slimmed) -> Slimmed:
    """Let the config of a slim transformers model, in place, say its sizes, if one can.

    Its layers share the config, and what its class's own methods make of it (caches, folders for
    `from_pretrained`) fits the slim model then. Where no config can, it stays, with a warning.

    Returns:
        The result, whose ambiguous sizes name the config's numbers that had to stay.

    """
    model: Any = result.model
    empty = any(tensor.is_meta for tensor in tensors_of(model).values())
    if result.form != "module" or not has_config(model) or not result.plan.removed or empty:
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
            ".".join(map(str, ("config", *place))), value, tuple(sorted({value, *became}))
        )
        for place, value in fit.search.architecture.numbers.items()
        if isinstance(value, int) and (became := fit.search.numbers.became.get(value))
    )
    return replace(result, ambiguous_sizes=result.ambiguous_sizes + stale)


def _takes_numbers_of(model: nn.Module, rebuilt: nn.Module, result: Slimmed) -> bool:
    """Put the numbers of the configs of a rebuilt model into a model's, if it computes the same then."""
    wanted = _outputs(model, result)
    theirs, mine = dict(rebuilt.named_modules()), dict(model.named_modules())
    changes = [
        change
        for path, module in mine.items()
        if hasattr(module, "config") and hasattr(theirs.get(path), "config")
        for change in _other_numbers(module.config, theirs[path].config)
    ]
    before = [(config, name, vars(config).get(name, _ABSENT)) for config, name, _ in changes]
    for config, name, value in changes:
        setattr(config, name, value)
    try:
        if _alike(_outputs(model, result), wanted):
            return True
    except Exception:  # the code refuses numbers in whatever way it likes
        pass
    for config, name, value in before:
        if value is _ABSENT:
            delattr(config, name)
        else:
            setattr(config, name, value)
    return False


def _other_numbers(config: Any, other: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield where a config, or one in it, says another number than its twin, and that number."""
    for name, value in vars(other).items():
        held = vars(config).get(name)
        if hasattr(value, "to_dict") and held is not None:
            yield from _other_numbers(held, value)
        elif _is_of_numbers(value) and held != value and not name.startswith("_"):
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
    with drafted_folder(Path(folder), _WEIGHTS, last="config.json") as draft:
        rebuilt.save_pretrained(draft)


def _gives_the_same(rebuilt: nn.Module, model: nn.Module, result: Slimmed) -> bool:
    slim = tensors_of(model)
    for name, tensor in tensors_of(rebuilt).items():
        tensor.data = tensor.data.to(slim[name].device, slim[name].dtype)
    return _alike(_outputs(rebuilt, result), _outputs(model, result))


def _outputs(model: nn.Module, result: Slimmed) -> list[Tensor]:
    """Return what a model gives in evaluation for the inputs that a result was found with."""
    with evaluating(model), torch.no_grad():
        return [tensor for _, tensor in output_tensors(call(model, result.inputs))]


def _alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        a.shape == b.shape
        and torch.allclose(a, b, _TOLERANCE, _TOLERANCE * float(b.abs().max()), equal_nan=True)
        for a, b in zip(found, wanted, strict=True)
    )
