"""From scores and a ratio to a plan: which groups are cut, by how much, and which of their slots go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from graphprune.allocation import Align, allowed_sizes, competing, nearest, per_cost, quantiles
from graphprune.cost import Amount, Cost, mac_cost, parameter_cost
from graphprune.errors import InvalidRequestError, warn
from graphprune.groups import DependencyGraph, Group
from graphprune.importance import Scores
from graphprune.plan import Plan

Unit: TypeAlias = Literal["channels", "parameters", "macs", "latency"]
Ranking: TypeAlias = Literal["auto", "uniform", "global"]

# A target that is missed by more than this share of the total is worth a warning.
_MISSED = 0.02


@dataclass(frozen=True)
class Request:
    """What to cut: the arguments of `slim` that concern the choice.

    Attributes:
        ratio: fraction to remove, 0 <= ratio < 1.
        of: what the ratio counts: "channels" of the groups that may be cut, "parameters", "macs" or
            measured "latency" of the whole model.
        ranking: "uniform" removes the same fraction of each group; "global" has the channels of all
            groups compete; "auto" is uniform for channels and global for the others.
        steps: how many times the channels that are left are scored while the ratio is approached: 1
            for a single ranking, more for iterative re-ranking.
        align: keep a multiple of this many channels where they belong to convolutions; "auto" keeps
            multiples of 16, of 8 in groups under 64, of 4 under 16; 1 keeps any number.
        include: cut only groups with a name, or a member parameter's name, that fits one of these globs.
        exclude: never cut groups with such a name.
        renormalised: also cut groups that a norm, mean or softmax runs along.

    """

    ratio: float
    of: Unit = "channels"
    align: Align = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    renormalised: bool = False
    ranking: Ranking = "auto"
    steps: int = 1

    def __post_init__(self) -> None:
        ratio = self.ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise InvalidRequestError(
                f"ratio={ratio!r} is the fraction to remove; it must be a number with 0 <= ratio < 1"
            )
        if self.of not in get_args(Unit):
            raise InvalidRequestError(
                f"of={self.of!r} must be 'channels', 'parameters', 'macs' or 'latency'"
            )
        if self.ranking not in ("auto", "uniform", "global"):
            raise InvalidRequestError(
                f"ranking={self.ranking!r} must be 'auto', 'uniform' or 'global'"
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidRequestError(f"steps={self.steps!r} must be a whole number from 1")
        if self.align != "auto" and (not isinstance(self.align, int) or self.align < 1):
            raise InvalidRequestError(
                f"align={self.align!r} must be 'auto' or a whole number from 1"
            )
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise InvalidRequestError(f"{name} must be a list of patterns, not the text alone")

    @property
    def is_global(self) -> bool:
        """Whether the channels of all groups compete."""
        return self.ranking == "global" or (self.ranking == "auto" and self.of != "channels")


@dataclass(frozen=True)
class Whole:
    """What a request counts from: a model before it was cut.

    Attributes:
        sizes: by name, how many slots each group had.
        options: by name, how many of them may be kept.
        total: the cost, in the request's unit.

    """

    sizes: dict[str, int]
    options: dict[str, list[int]]
    total: float

    @classmethod
    def of(cls, graph: DependencyGraph, request: Request, total: float | None = None) -> Whole:
        """Return what the request counts from where the graph is that of the model before any cut."""
        groups = eligible(graph, request)
        if total is None:
            total = _cost(graph, groups, request.of).total()
        return cls(
            {group.name: group.size for group in groups},
            {group.name: allowed_sizes(graph, group, request.align) for group in groups},
            total,
        )


def choose(
    graph: DependencyGraph,
    scores_without: Callable[[Plan | None], Scores],
    request: Request,
    *,
    losses: bool = False,
    whole: Whole | None = None,
    cost: Amount | None = None,
) -> Plan:
    """Return the plan that the request asks for; warns where it cannot be met.

    Args:
        graph: the groups to choose from.
        scores_without: gives, by group, a score a slot, once what a plan removes is gone; asked once
            a step, first without a plan.
        request: what to cut.
        losses: the scores are amounts of a loss, so that channels of different groups compete by loss
            for each channel, parameter or MAC saved; else by the scores as they are.
        whole: what the ratio is a fraction of, where the graph is of a model that was cut before.
        cost: what the ratio counts, where that is no count of channels, parameters or MACs.

    Raises:
        InvalidRequestError: a pattern of the request fits nothing.

    """
    groups = eligible(graph, request)
    if not groups and request.ratio > 0:
        warn(_nothing_to_cut(graph, request))
    cost = cost or _cost(graph, groups, request.of)
    now = Whole.of(graph, request, cost.total())
    whole = now if whole is None else whole
    known = {**now.options, **whole.options}
    options = {g.name: [o for o in known[g.name] if o < g.size] + [g.size] for g in groups}
    keep = {group.name: list(range(group.size)) for group in groups}
    sizes = {group.name: group.size for group in groups}
    for step in range(1, request.steps + 1):
        scores = _of_what_is_left(scores_without(Plan(keep, sizes) if step > 1 else None), keep)
        ratio = request.ratio * step / request.steps
        if request.of == "channels" and not request.is_global:
            before = {**now.sizes, **whole.sizes}
            wanted = {name: size * (1 - ratio) for name, size in before.items()}
            counts = {g.name: nearest(options[g.name], wanted[g.name]) for g in groups}
        else:
            priorities = scores if request.is_global else quantiles(scores)
            if request.is_global and losses:
                left = {name: len(kept) for name, kept in keep.items()}
                priorities = per_cost(groups, scores, options, cost, left)
            target = whole.total * (1 - ratio + 1e-9)  # so that rounding takes none too many
            counts = competing(groups, priorities, options, cost, target)
        keep = {group.name: highest(scores[group.name], counts[group.name]) for group in groups}
    inexact = [g.name for g in groups if not g.exact and len(keep[g.name]) < g.size]
    if inexact:
        warn(_inexact(graph, inexact))
    _warn_of_missed(groups, options, keep, cost, whole.total, request)
    asked = {name: getattr(request, name) for name in ("ratio", "of", "ranking", "steps", "align")}
    return Plan(keep, sizes, asked)


def _cost(graph: DependencyGraph, groups: Sequence[Group], unit: Unit) -> Cost:
    if unit == "channels":
        return Cost(0, tuple((1, (group.axis,)) for group in groups))
    return (parameter_cost if unit == "parameters" else mac_cost)(graph.inference)


def _of_what_is_left(scores: Scores, keep: Mapping[str, Sequence[int]]) -> Scores:
    """Return the scores, minus infinity for slots that are gone."""
    return {
        name: np.where(np.isin(np.arange(len(scores[name])), kept), scores[name], -np.inf)
        for name, kept in keep.items()
    }


def eligible(graph: DependencyGraph, request: Request) -> list[Group]:
    """Return the groups that the request lets be cut."""
    for pattern in (*request.include, *request.exclude):
        if not any(_fits(group, [pattern]) for group in graph.groups):
            _check_names_something(graph, pattern)
    return [group for group in graph.groups if _may_cut(group, request)]


def _may_cut(group: Group, request: Request) -> bool:
    if group.size < 2 or _fits(group, request.exclude):
        return False
    if not (group.exact or request.renormalised):
        return False
    if request.include and not _fits(group, request.include):
        return False
    return not group.inner or any(fnmatchcase(group.name, p) for p in request.include)


def _fits(group: Group, patterns: Iterable[str]) -> bool:
    names = [group.name, *(member.parameter for member in group.members)]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _check_names_something(graph: DependencyGraph, pattern: str) -> None:
    every = [name for names in graph.inference.names.values() for name in names]
    if any(fnmatchcase(name, pattern) for name in every):
        return
    some = ", ".join(every[:5])
    raise InvalidRequestError(
        f"the pattern {pattern!r} fits no parameter and no group of the model; names are like {some}"
    )


def _nothing_to_cut(graph: DependencyGraph, request: Request) -> str:
    if not graph.groups:
        return (
            "no channels of this model can be removed, so it is returned as it was; "
            "print(graphprune.analyze(model, inputs)) says why for every dimension"
        )
    barred = {
        "excluded": sum(_fits(g, request.exclude) for g in graph.groups),
        "renormalised (allow with renormalised=True)": sum(not g.exact for g in graph.groups),
        "inner to larger units": sum(g.inner for g in graph.groups),
    }
    counted = ", ".join(f"{count} {why}" for why, count in barred.items() if count)
    return (
        f"no group of this model may be cut as asked (of {len(graph.groups)}, {counted}), so it is "
        "returned as it was"
    )


def _inexact(graph: DependencyGraph, names: Sequence[str]) -> str:
    operators = {r.operator for n in names for r in graph.by_name[n].renormalised}
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{', '.join(sorted(operators))} takes a statistic over channels that are cut, now over fewer of "
        f"them, so the slim model differs from the silenced original; groups: {shown}"
    )


def highest(values: npt.NDArray[np.float64], count: int) -> list[int]:
    """Return the indices of the `count` highest values, in order; earlier ones win ties."""
    order = np.argsort(-values, kind="stable")[:count]
    return sorted(int(i) for i in order)


def _warn_of_missed(
    groups: Sequence[Group],
    options: Mapping[str, Sequence[int]],
    keep: Mapping[str, Sequence[int]],
    cost: Amount,
    total: float,
    request: Request,
) -> None:
    """Warn where the numbers allowed do not let the target be met."""
    if not groups or request.of == "latency":  # of which the measurement will tell
        return

    def removed(counts: Mapping[str, int]) -> float:
        return 1 - cost.total({g.axis: counts[g.name] for g in groups}) / max(total, 1)

    counts = {name: len(kept) for name, kept in keep.items()}
    share = removed(counts)
    if request.of == "channels" and not request.is_global:
        if share > 0 or request.ratio == 0:
            return
        why = (
            "and none go, since that is less than half a step between the numbers of channels allowed; "
            "align=1 allows any"
        )
    elif share < request.ratio - 1e-9:
        why = (
            f"but with at least one channel left in each group that may be cut only {share:.0%} can go; "
            "renormalised=True or align=1 may free more"
        )
    elif share > request.ratio + _MISSED:
        step = {
            name: min(o for o in options[name] if o > count) - count
            for name, count in counts.items()
            if count < options[name][-1]
        }
        finest = max(step, key=lambda name: removed({**counts, name: counts[name] + step[name]}))
        why = (
            f"and {share:.1%} go, since the numbers of channels allowed are no finer (the next step, "
            f"{step[finest]} more of {finest!r}, leaves too many)"
            f"{'' if request.align == 1 else '; align=1 comes nearer'}"
        )
    else:
        return
    warn(f"asked to remove {request.ratio:.0%} of {request.of}, {why}")
