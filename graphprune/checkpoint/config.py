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
    NumberPath,
    copy_with_changes,
    has_config,
)
from graphprune.transformers_config.fitting import ContentOf, find
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
        fit = find(result, _make_filler(config, Architecture(model)))
    except InvalidRequestError as refusal:
        return None, str(refusal)
    return (None, why_none(fit)) if fit.model is None else (fit.content, "")


def _make_filler(config: Mapping[str, Any], architecture: Architecture) -> ContentOf:
    """Return what gives the content of the new config.json for changes of numbers."""

    def fill_in_changes(changes: Changes) -> dict[str, Any]:
        content = copy_with_changes(architecture.content, changes)
        # All numbers, changed or not: the file may leave some to the defaults of the class.
        paths = [*changes, *architecture.numbers]
        return _fill_in(architecture.without_aliases(config), content, paths, changes)

    return fill_in_changes


def _fill_in(
    config: Mapping[str, Any],
    content: Mapping[str, Any],
    paths: Iterable[NumberPath],
    changes: Changes,
) -> dict[str, Any]:
    """Return a config with what stands at places where it has nothing, or where there are changes."""
    new_config = copy.deepcopy(dict(config))
    for path in paths:
        target: Any = new_config
        source: Any = content
        # Down both configs at once, to what holds the number in each.
        for key in path[:-1]:
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = copy.deepcopy(source[key])
            target, source = target[key], source[key]
        last_key = path[-1]
        if path in changes:
            target[last_key] = changes[path]
        elif (
            isinstance(target, dict)
            and target.get(last_key) is None
            and source.get(last_key) is not None
        ):
            target[last_key] = source[last_key]
    return new_config
