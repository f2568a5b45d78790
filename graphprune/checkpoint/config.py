"""The config.json of a slim checkpoint, where one can say its sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from graphprune.errors import InvalidRequestError
from graphprune.report.result import Slimmed
from graphprune.transformers_config.configs import (
    Architecture,
    Changes,
    Place,
    has_config,
    with_changes,
)
from graphprune.transformers_config.fitting import Written, find
from graphprune.transformers_config.unfitting import why_none


def slim_config(
    config: Mapping[str, Any], model: nn.Module, result: Slimmed
) -> tuple[Mapping[str, Any] | None, str]:
    """Return a config with the sizes of the slim model, or None and why there is none.

    Args:
        config: what config.json says of the original.
        model: the original, without values.
        result: the slim model, without values.

    """
    if not has_config(model):
        return None, f"{type(model).__name__} has no config of transformers"
    if result.form != "module":
        return None, f"it is a graph: {result.why_graph}"
    try:
        fit = find(result, _filling(config, Architecture(model)))
    except InvalidRequestError as refusal:
        return None, str(refusal)
    return (None, why_none(fit)) if fit.model is None else (fit.content, "")


def _filling(config: Mapping[str, Any], architecture: Architecture) -> Written:
    """Return what gives the content of the new config.json for changes of numbers."""

    def written(changes: Changes) -> dict[str, Any]:
        content = with_changes(architecture.content, changes)
        places = [*changes, *architecture.numbers]
        return _filled(architecture.without_aliases(config), content, places, changes)

    return written


def _filled(
    config: Mapping[str, Any], content: Mapping[str, Any], places: Iterable[Place], changes: Changes
) -> dict[str, Any]:
    """Return a config with what stands at places where it has nothing, or where there are changes."""
    result = copy.deepcopy(dict(config))
    for place in places:
        owner: Any = result
        value: Any = content
        for key in place[:-1]:
            if isinstance(owner, dict) and key not in owner:
                owner[key] = copy.deepcopy(value[key])
            owner, value = owner[key], value[key]
        last = place[-1]
        if place in changes:
            owner[last] = changes[place]
        elif isinstance(owner, dict) and owner.get(last) is None and value.get(last) is not None:
            owner[last] = value[last]
    return result
