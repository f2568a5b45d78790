"""Why no config says the sizes of a slim model, and which groups it would have to leave whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from graphprune.errors import listed
from graphprune.layout import Layout, free_axes
from graphprune.masks import counts_of, kept_size
from graphprune.report.result import Slimmed
from graphprune.selection.plan import Plan
from graphprune.transformers_config.configs import Architecture, Place, Shapes, shapes, tensors_of
from graphprune.transformers_config.fitting import Dim, Fit, Search

# Groups are left whole in so many rounds at most; more at a time follow from what the first ones leave.
_ROUNDS = 4


def why_none(fit: Fit) -> str:
    """Return the reason that a search found nothing, and what would let it find something."""
    architecture, plan = fit.search.architecture, fit.result.plan
    why = _odd_sizes(fit) if fit.difference is None else fit.difference.text
    text = f"no {architecture.name} says the sizes of the slim model: {why}"
    left = _groups_to_leave(architecture, fit)
    if left is None:
        return text
    if not left:
        return f"{text}; none of the groups that are cut can be said by one"
    advice = f"slim with exclude={patterns_of(left, plan)}, which leaves these groups whole"
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
        wide = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        others = [cut for cut in plan.keep if fnmatchcase(cut, wide) and cut not in names]
        patterns[name if others or wide.count("*") == 0 else wide] = None
    return list(patterns)


def _odd_sizes(fit: Fit) -> str:
    """Return which sizes no number of the config gives."""
    missed = set(fit.search.missed)
    unused = set(fit.result.graph.inference.unused)
    for place, asked in fit.search.conflicts.items():
        firsts = {value: dim for dim, value in sorted(asked.items(), reverse=True)}
        if None not in firsts and len(firsts) > 1 and asked.keys() & missed:
            wanted = [
                f"{value} for {name}:{dim}"
                + (" (which the example inputs do not reach)" if name in unused else "")
                for value, (name, dim) in sorted(firsts.items(), key=lambda item: item[1])
            ]
            return f"{_spelt(place)} would have to be {' and '.join(wanted[:3])}"
    slim = shapes(fit.result.model)
    names = list(dict.fromkeys(name for name, _ in fit.search.missed))
    return f"no number in it gives {listed([f'{n} {list(slim.get(n, ()))}' for n in names])}"


def _spelt(place: Place) -> str:
    first, *rest = place
    return str(first) + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in rest)


def _groups_to_leave(architecture: Architecture, fit: Fit) -> list[str] | None:
    """Return groups without whose cut a config gives the shapes: none where that takes all.

    None instead of a list stands for not known.
    """
    result = fit.result
    left = _of_operator(fit) or _of_buffer(fit) or _of_shapes(result, result.plan, fit.search)
    more = left
    for _ in range(_ROUNDS):
        plan = result.plan.without(left)
        if not plan.removed:
            return []
        if not more:
            return None
        search = Search(architecture, _shapes_by(result, plan), fit.search.numbers, hidden=False)
        if next(search.fitting(), None) is not None:
            return left
        more = _of_shapes(result, plan, search)
        left = left + more
    return None


def _of_operator(fit: Fit) -> list[str]:
    """Return the groups that are cut in the operator that would have other numbers."""
    steps = fit.result.graph.inference.steps
    if fit.difference is None or fit.difference.step is None or fit.difference.step >= len(steps):
        return []
    step = steps[fit.difference.step]
    layouts = [layout for value in (*step.outputs, *step.inputs) for layout in value.layouts]
    return _cut_in(fit.result, fit.result.plan, layouts)


def _of_buffer(fit: Fit) -> list[str]:
    """Return the groups whose sizes a buffer is computed from that would be another."""
    if fit.difference is None or fit.difference.buffer is None:
        return []
    search, name = fit.search, fit.difference.buffer
    original = tensors_of(search.architecture.changed({}))[name]
    dims: list[Dim] = []
    for place, value in search.nearest.items():
        if search.architecture.shapes({place: value}):
            changed = tensors_of(search.architecture.changed({place: value}))[name]
            dims += [] if torch.equal(changed, original) else search.alone[place]
    return _of_dimensions(fit.result, fit.result.plan, dims)


def _of_shapes(result: Slimmed, plan: Plan, search: Search) -> list[str]:
    """Return the groups that a plan cuts in dimensions that come out wrong.

    Where these are the ones that it leaves, groups in dimensions that go by the same number.
    """
    conflicts = [dim for asked in search.conflicts.values() for dim in asked]
    return _of_dimensions(result, plan, search.missed) or _of_dimensions(result, plan, conflicts)


def _of_dimensions(result: Slimmed, plan: Plan, dims: Sequence[Dim]) -> list[str]:
    """Return the groups that a plan cuts in dimensions of parameters."""
    by_name = _layouts_by_name(result)
    layouts = [by_name[name][dim] for name, dim in dims if dim < len(by_name.get(name, []))]
    return _cut_in(result, plan, layouts)


def _cut_in(result: Slimmed, plan: Plan, layouts: Iterable[Layout]) -> list[str]:
    cut = plan.masks(result.graph)
    axes = dict.fromkeys(axis for layout in layouts for axis in free_axes(layout) if axis in cut)
    return [result.graph.names[axis] for axis in axes]


def _layouts_by_name(result: Slimmed) -> dict[str, list[Layout]]:
    inference = result.graph.inference
    return {
        name: inference.parameters[first]
        for first, names in inference.names.items()
        for name in names
        if first in inference.parameters
    }


def _shapes_by(result: Slimmed, plan: Plan) -> Shapes:
    """Return the shapes that a plan would give."""
    kept, by_name = counts_of(plan.masks(result.graph)), _layouts_by_name(result)
    return {
        name: tuple(kept_size(layout, kept) for layout in by_name[name])
        if name in by_name
        else shape
        for name, shape in shapes(result.model).items()
    }
