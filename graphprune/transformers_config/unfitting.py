"""Why no config says the sizes of a slim model, and which groups it would have to leave whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from graphprune.errors import listed
from graphprune.layout import Layout, free_axes
from graphprune.masks import count_kept_slots, kept_size
from graphprune.report.result import Slimmed
from graphprune.selection.plan import Plan
from graphprune.transformers_config.configs import (
    Architecture,
    NumberPath,
    Shapes,
    shapes,
    tensors_of,
)
from graphprune.transformers_config.fitting import Dim, Fit, Search

# Groups are left whole in so many rounds at most; more at a time follow from what the first ones leave.
_ROUNDS = 4


def why_none(fit: Fit) -> str:
    """Return the reason that a search found nothing, and what would let it find something."""
    architecture, plan = fit.search.architecture, fit.result.plan
    why = _odd_sizes(fit) if fit.difference is None else fit.difference.text
    text = f"no {architecture.name} says the sizes of the slim model: {why}"
    groups_to_leave = _find_groups_to_leave(architecture, fit)
    if groups_to_leave is None:
        return text
    if not groups_to_leave:
        return f"{text}; none of the groups that are cut can be said by one"
    advice = (
        f"slim with exclude={patterns_of(groups_to_leave, plan)}, which leaves these groups whole"
    )
    if fit.search.conflicts and not _cuts_alike(plan):
        advice = f"cut every layer alike (of='channels', ranking='uniform'), or {advice}"
    return f"{text}; {advice}"


def _cuts_alike(plan: Plan) -> bool:
    """Say whether a plan was asked to take the same share of every group."""
    return plan.request.get("of") == "channels" and plan.request.get("ranking") != "global"


def patterns_of(names: Iterable[str], plan: Plan) -> list[str]:
    """Return patterns for `exclude=` that fit these groups and no other that the plan cuts."""
    names = list(names)
    patterns: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        wrongly_cut = [
            group_name
            for group_name in plan.keep
            if fnmatchcase(group_name, pattern) and group_name not in names
        ]
        # "layers.0.mlp" becomes "layers.*.mlp", unless that would also leave out layers to be cut.
        patterns[name if wrongly_cut or pattern.count("*") == 0 else pattern] = None
    return list(patterns)


def _odd_sizes(fit: Fit) -> str:
    """Return which sizes no number of the config gives."""
    missed = set(fit.search.missed)
    unused_names = set(fit.result.graph.inference.unused)
    for path, followers in fit.search.conflicts.items():
        # Last written wins: each number with the first of the dimensions that want it.
        first_dims = {value: dim for dim, value in sorted(followers.items(), reverse=True)}
        if None not in first_dims and len(first_dims) > 1 and followers.keys() & missed:
            demands = [
                f"{value} for {name}:{dim}"
                + (" (which the example inputs do not reach)" if name in unused_names else "")
                for value, (name, dim) in sorted(first_dims.items(), key=lambda item: item[1])
            ]
            return f"{_format_path(path)} would have to be {' and '.join(demands[:3])}"
    slim = shapes(fit.result.model)
    names = list(dict.fromkeys(name for name, _ in fit.search.missed))
    return f"no number in it gives {listed([f'{n} {list(slim.get(n, ()))}' for n in names])}"


def _format_path(path: NumberPath) -> str:
    first_key, *inner_keys = path
    return str(first_key) + "".join(
        f"[{key}]" if isinstance(key, int) else f".{key}" for key in inner_keys
    )


def _find_groups_to_leave(architecture: Architecture, fit: Fit) -> list[str] | None:
    """Return groups without whose cut a config gives the shapes: none where that takes all.

    None instead of a list stands for not known.
    """
    result = fit.result
    group_names = (
        _find_groups_of_operator(fit)
        or _find_groups_of_buffer(fit)
        or _find_groups_of_shapes(result, result.plan, fit.search)
    )
    new_names = group_names
    for _ in range(_ROUNDS):
        plan = result.plan.without(group_names)
        if not plan.removed:
            return []
        # Nothing more to blame, and still no config: which groups it would take is not known.
        if not new_names:
            return None
        search = Search(
            architecture, _shapes_by_plan(result, plan), fit.search.numbers, hidden=False
        )
        if next(search.fitting(), None) is not None:
            return group_names
        new_names = _find_groups_of_shapes(result, plan, search)
        group_names = group_names + new_names
    return None


def _find_groups_of_operator(fit: Fit) -> list[str]:
    """Return the groups that are cut in the operator that would have other numbers."""
    steps = fit.result.graph.inference.steps
    if fit.difference is None or fit.difference.step is None or fit.difference.step >= len(steps):
        return []
    step = steps[fit.difference.step]
    layouts = [layout for value in (*step.outputs, *step.inputs) for layout in value.layouts]
    return _find_cut_groups(fit.result, fit.result.plan, layouts)


def _find_groups_of_buffer(fit: Fit) -> list[str]:
    """Return the groups whose sizes a buffer is computed from that would be another."""
    if fit.difference is None or fit.difference.buffer is None:
        return []
    search, name = fit.search, fit.difference.buffer
    original = tensors_of(search.architecture.build_with({}))[name]
    dims: list[Dim] = []
    # Each changed number by itself: where the buffer moves, it is computed from that one.
    for path, value in search.nearest.items():
        if search.architecture.shapes({path: value}):
            changed = tensors_of(search.architecture.build_with({path: value}))[name]
            dims += [] if torch.equal(changed, original) else search.alone[path]
    return _find_groups_of_dimensions(fit.result, fit.result.plan, dims)


def _find_groups_of_shapes(result: Slimmed, plan: Plan, search: Search) -> list[str]:
    """Return the groups that a plan cuts in dimensions that come out wrong.

    Where these are the ones that it leaves, groups in dimensions that go by the same number.
    """
    conflicting_dims = [dim for followers in search.conflicts.values() for dim in followers]
    return _find_groups_of_dimensions(result, plan, search.missed) or _find_groups_of_dimensions(
        result, plan, conflicting_dims
    )


def _find_groups_of_dimensions(result: Slimmed, plan: Plan, dims: Sequence[Dim]) -> list[str]:
    """Return the groups that a plan cuts in dimensions of parameters."""
    by_name = _layouts_by_name(result)
    layouts = [by_name[name][dim] for name, dim in dims if dim < len(by_name.get(name, []))]
    return _find_cut_groups(result, plan, layouts)


def _find_cut_groups(result: Slimmed, plan: Plan, layouts: Iterable[Layout]) -> list[str]:
    masks = plan.masks(result.graph)
    axes = dict.fromkeys(axis for layout in layouts for axis in free_axes(layout) if axis in masks)
    return [result.graph.names[axis] for axis in axes]


def _layouts_by_name(result: Slimmed) -> dict[str, list[Layout]]:
    inference = result.graph.inference
    return {
        name: inference.parameters[first_name]
        for first_name, names in inference.names.items()
        for name in names
        if first_name in inference.parameters
    }


def _shapes_by_plan(result: Slimmed, plan: Plan) -> Shapes:
    """Return the shapes that a plan would give."""
    kept, by_name = count_kept_slots(plan.masks(result.graph)), _layouts_by_name(result)
    return {
        name: tuple(kept_size(layout, kept) for layout in by_name[name])
        if name in by_name
        else shape
        for name, shape in shapes(result.model).items()
    }
