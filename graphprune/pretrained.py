"""Slim transformers models as folders that `from_pretrained` reads, where a config can say their sizes."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import InvalidRequestError
from graphprune.forms import Slimmed
from graphprune.inputs import call, output_tensors
from graphprune.state import evaluating

_TOLERANCE = 1e-4

# Sizes that could explain what changed are tried together, up to this many at once.
_MOST_CHANGES = 4

# Sets of changes that are tried at most; each is a model built without memory.
_MOST_TRIED = 500

# Stands for a size that the config leaves open, to see what follows it.
_PROBE = 7

Place = tuple[str, ...]
Candidate = tuple[Place, int]
Shapes = dict[str, tuple[int, ...]]


def save_pretrained(result: Slimmed, folder: str | Path) -> None:
    """Write a slim transformers model so that its class's `from_pretrained` reads it again.

    Which sizes of the config have to change is found by building the model from changed ones, without
    memory for its weights, until the shapes are those of the slim model; then it is built with its
    weights, and has to give what the slim model gives. A tokenizer is for you to save beside it.

    Args:
        result: what `graphprune.slimmed` returned for a transformers model, in module form.
        folder: where `save_pretrained` of the model writes config and weights.

    Raises:
        InvalidRequestError: the model is no transformers model in module form, or no config of its kind
            says its sizes: widths that differ from layer to layer, most often.

    """
    model: Any = result.model
    config = getattr(model, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(model, "save_pretrained")):
        raise InvalidRequestError(
            f"{type(model).__name__} has no config and no save_pretrained of transformers; use "
            "graphprune.save"
        )
    wanted, first = shapes(model), next(model.parameters())
    for changes in fitting_changes(type(model), config, wanted):
        with torch.random.fork_rng():
            rebuilt = type(model)(with_changes(config, changes)).to(first.device, first.dtype)
        rebuilt.load_state_dict(model.state_dict())
        if _gives_the_same(rebuilt, model, result):
            if hasattr(model, "generation_config"):
                rebuilt.generation_config = copy.deepcopy(model.generation_config)
            rebuilt.save_pretrained(folder)
            return
    own = shapes_of(type(model), config)
    odd = [name for name, shape in own.items() if wanted.get(name) != shape]
    more = f" and {len(odd) - 3} more" if odd[3:] else ""
    raise InvalidRequestError(
        f"no {type(config).__name__} says the sizes of {', '.join(odd[:3])}{more}; cut every layer alike "
        "(of='channels'), leave out with exclude= what the config cannot say, or use graphprune.save"
    )


def shapes(model: nn.Module) -> Shapes:
    """Return the shapes of a model's state."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes_of(kind: Any, config: Any, changes: Mapping[Place, int] | None = None) -> Shapes:
    """Return the shapes of a model of the changed config, or nothing where there is none."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return shapes(kind(with_changes(config, changes or {})))
    except Exception:  # a config refuses some sizes in whatever way it likes
        return {}


def fitting_changes(kind: Any, config: Any, wanted: Shapes) -> Iterator[dict[Place, int]]:
    """Yield changes of a config that give models these shapes, the fewest first."""
    needed, others = _candidates(kind, config, wanted)
    tried = (needed | dict(some) for some in _combinations(others))
    for changes in itertools.islice(tried, _MOST_TRIED):
        if shapes_of(kind, config, changes) == wanted:
            yield changes


def _combinations(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    """Yield the sets of changes of one value at a place."""
    for count in range(_MOST_CHANGES + 1):
        for some in itertools.combinations(candidates, count):
            if len({place for place, _ in some}) == count:
                yield some


def _candidates(kind: Any, config: Any, wanted: Shapes) -> tuple[dict[Place, int], list[Candidate]]:
    """Return changes of the config that shapes ask for, and others that would explain a shape.

    Each size is doubled by itself: the dimensions that follow say what value they would want. One that
    follows no other size has to have it. A size that is left open is set, and dimensions are taken to be
    multiples of it.
    """
    now, sizes = shapes_of(kind, config), dict(sizes_of(config))
    asked: dict[tuple[str, int], dict[Place, int | None]] = {}
    for place, size in sizes.items():
        trial = _PROBE if size is None else 2 * size
        tried = shapes_of(kind, config, {place: trial})
        for name in now.keys() & tried.keys() & wanted.keys():
            for dim, values in enumerate(zip(now[name], tried[name], wanted[name], strict=False)):
                if values[0] != values[1]:
                    asked.setdefault((name, dim), {})[place] = _asked(size, trial, *values)
    needed: dict[Place, int] = {}
    others: list[Candidate] = []
    for place, size in sizes.items():
        alone = {each[place] for each in asked.values() if each.keys() == {place}}
        some = {each[place] for each in asked.values() if place in each} - {size, None}
        if len(alone) == 1 and alone != {size}:
            needed |= {place: value for value in alone if value is not None}  # noqa: B035 (there is one)
        elif not alone:
            others += [(place, value) for value in sorted(filter(None, some))]
    return needed, others


def _asked(size: int | None, trial: int, before: int, after: int, wanted: int) -> int | None:
    """Return the size that a dimension of `wanted` asks for: its own for one that stays, None for none."""
    if wanted == before:
        return size
    origin, start = (0, 0) if size is None else (size, before)
    value = origin + (wanted - start) * (trial - origin) / (after - start)
    return int(value) if value == int(value) and value > 0 else None


def sizes_of(config: Any, path: Place = ()) -> Iterator[tuple[Place, int | None]]:
    """Yield the places of a config, and of configs in it, that hold a size or nothing."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and not isinstance(value, type):
            yield from sizes_of(value, (*path, name))
        elif value is None or (
            isinstance(value, int) and not isinstance(value, bool) and value > 1
        ):
            yield (*path, name), value


def with_changes(config: Any, changes: Mapping[Place, int]) -> Any:
    """Return a copy of a config with other sizes."""
    changed = copy.deepcopy(config)
    for path, value in changes.items():
        owner = changed
        for name in path[:-1]:
            owner = getattr(owner, name)
        setattr(owner, path[-1], value)
    return changed


def _gives_the_same(rebuilt: nn.Module, model: nn.Module, result: Slimmed) -> bool:
    with evaluating(rebuilt), evaluating(model):
        try:
            outputs = [
                [tensor for _, tensor in output_tensors(call(one, result.inputs))]
                for one in (rebuilt, model)
            ]
        except (RuntimeError, ValueError):
            return False
    return len(outputs[0]) == len(outputs[1]) and all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(b.abs().max()))
        for a, b in zip(*outputs, strict=True)
    )
