"""From scores and a ratio to a plan: which groups are cut, by how much, and which of their slots go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from torch import nn

from graphprune.errors import InvalidRequestError, warn
from graphprune.groups.cost import Amount, Cost, mac_cost, parameter_cost
from graphprune.groups.groups import Dependencies, Group, Scores
from graphprune.groups.name_patterns import Pattern, Selection, by_name
from graphprune.selection.allocation import (
    Align,
    Changes,
    allowed_sizes,
    competing,
    nearest,
    per_cost,
    quantiles,
)
from graphprune.selection.plan import Plan

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
        include: cut only groups with a name, or a member parameter's or its module's name, that fits one
            of these globs; a module stands for all parameters in it.
        exclude: never cut groups with such a name.
        renormalised: also cut groups that a norm, mean or softmax runs along.

    """

    ratio: float
    of: Unit = "channels"
    align: Align = "auto"
    include: Sequence[Pattern] = ()
    exclude: Sequence[Pattern] = ()
    renormalised: bool = False
    ranking: Ranking = "auto"
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _fraction(self.ratio))
        if self.of not in get_args(Unit):
            raise InvalidRequestError(
                f"of={self.of!r} must be 'channels', 'parameters', 'macs' or 'latency'"
            )
        if self.ranking not in ("auto", "uniform", "global"):
            raise InvalidRequestError(
                f"ranking={self.ranking!r} must be 'auto', 'uniform' or 'global'"
            )
        if not isinstance(self.steps, Integral) or self.steps < 1:
            raise InvalidRequestError(f"steps={self.steps!r} must be a whole number from 1")
        if self.align != "auto" and (not isinstance(self.align, Integral) or self.align < 1):
            raise InvalidRequestError(
                f"align={self.align!r} must be 'auto' or a whole number from 1"
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, (str, nn.Module)) or not all(
                isinstance(pattern, (str, nn.Module)) for pattern in patterns
            ):
                raise InvalidRequestError(
                    f"{name} must be a list of patterns or modules, as in {name}=['head*'], not "
                    f"{_in_short(patterns)}"
                )
        for name in ("steps", "align"):  # plans are saved, and numpy's numbers cannot be
            value = getattr(self, name)
            object.__setattr__(self, name, value if value == "auto" else int(value))

    def named(self, model: nn.Module) -> Request:
        """Return the request with globs of names for the modules among its patterns.

        Raises:
            InvalidRequestError: one is no module of the model, or holds no parameters.

        """
        include, exclude = (
            by_name(getattr(self, what), model, what) for what in ("include", "exclude")
        )
        return replace(self, include=include, exclude=exclude)

    @property
    def is_global(self) -> bool:
        """Whether the channels of all groups compete."""
        return self.ranking == "global" or (self.ranking == "auto" and self.of != "channels")


def _fraction(ratio: Any) -> float:
    if isinstance(ratio, Real) and not isinstance(ratio, bool) and 0 <= float(ratio) < 1:
        return float(ratio)
    order = (
        "; the arguments are slim(model, ratio, example_inputs)"
        if not isinstance(ratio, (Real, str))
        else ""
    )
    raise InvalidRequestError(
        f"ratio={_in_short(ratio)} is the fraction to remove; it must be a number with 0 <= ratio < 1"
        f"{order}"
    )


def _in_short(value: Any) -> str:
    """Return a number or a text as it is written, of other things what they are."""
    return repr(value) if isinstance(value, (Real, str)) else f"a {type(value).__name__}"


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
    def of(cls, graph: Dependencies, request: Request, total: float | None = None) -> Whole:
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
    graph: Dependencies,
    scores_without: Callable[[Plan | None], Scores],
    request: Request,
    *,
    losses: bool = False,
    whole: Whole | None = None,
    cost: Amount | None = None,
    final: bool = True,
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
        final: whether no further cut follows, which would come nearer to what is wanted in the end.

    Raises:
        InvalidRequestError: a pattern of the request fits nothing.

    """
    selected = selection(graph, request)
    groups = [group for group in graph.groups if selected.may_cut(group)]
    overruled = (
        selected.overruled() if whole is None else ""
    )  # said once, of the first step of several
    if overruled:
        warn(overruled)
    if not groups and request.ratio > 0:
        warn(_nothing_to_cut(graph, selected))
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
    if groups and final and request.of != "latency":  # of which the measurement will tell
        missed = _Missed(graph, groups, options, keep, cost, whole.total, request)
        why = missed.why({**now.sizes, **whole.sizes})
        if why:
            warn(
                f"asked to remove {_percent(request.ratio)} of {request.of}, {why}{missed.advice()}"
            )
    asked = {name: getattr(request, name) for name in ("ratio", "of", "ranking", "steps", "align")}
    return Plan(keep, sizes, asked)


def _cost(graph: Dependencies, groups: Sequence[Group], unit: Unit) -> Cost:
    if unit == "channels":
        return Cost(0, tuple((1, (group.axis,)) for group in groups))
    return (parameter_cost if unit == "parameters" else mac_cost)(graph.inference)


def _of_what_is_left(scores: Scores, keep: Mapping[str, Sequence[int]]) -> Scores:
    """Return the scores, minus infinity for slots that are gone."""
    return {
        name: np.where(np.isin(np.arange(len(scores[name])), kept), scores[name], -np.inf)
        for name, kept in keep.items()
    }


def selection(graph: Dependencies, request: Request) -> Selection:
    """Return which groups a request names, its modules by their names (`Request.named`).

    Raises:
        InvalidRequestError: a pattern fits nothing.

    """
    include, exclude = (
        [pattern for pattern in patterns if isinstance(pattern, str)]
        for patterns in (request.include, request.exclude)
    )
    return Selection.of(graph, include, exclude, renormalised=request.renormalised)


def eligible(graph: Dependencies, request: Request) -> list[Group]:
    """Return the groups that the request lets be cut."""
    selected = selection(graph, request)
    return [group for group in graph.groups if selected.may_cut(group)]


def _nothing_to_cut(graph: Dependencies, selected: Selection) -> str:
    if not graph.groups:
        return (
            "no channels of this model can be removed, so it is returned as it was; "
            "print(graphprune.analyze(model, inputs)) says why for every dimension"
        )
    barred = {
        "excluded": sum(selected.excludes(g) for g in graph.groups),
        "renormalised (allow with renormalised=True)": sum(
            not (g.exact or selected.renormalised) for g in graph.groups
        ),
        "inner to larger units": sum(g.inner for g in graph.groups),
        "not included": sum(
            bool(selected.include) and not selected.includes(g) for g in graph.groups
        ),
    }
    counted = ", ".join(f"{count} {why}" for why, count in barred.items() if count)
    return (
        f"no group of this model may be cut as asked (of {len(graph.groups)}, {counted}), so it is "
        "returned as it was"
    )


def _inexact(graph: Dependencies, names: Sequence[str]) -> str:
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


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


@dataclass(frozen=True)
class _Missed:
    """What was asked for, and what was chosen, where the numbers allowed may not let it be met."""

    graph: Dependencies
    groups: Sequence[Group]
    options: Mapping[str, Sequence[int]]
    keep: Mapping[str, Sequence[int]]
    cost: Amount
    total: float
    request: Request

    def removed(self, counts: Mapping[str, int]) -> float:
        """Return the share of the cost that goes with so many slots kept."""
        left = {group.axis: counts[group.name] for group in self.groups}
        return 1 - self.cost.total(left) / max(self.total, 1)

    def why(self, before: Mapping[str, int]) -> str:
        """Return how far the target is missed and why; "" where it is met.

        Args:
            before: by group, how many slots it had before any cut.

        """
        counts = {group.name: len(self.keep[group.name]) for group in self.groups}
        share, ratio = self.removed(counts), self.request.ratio
        if self._is_uniform:
            return self._of_each_group(counts, before)
        if share < ratio - 1e-9:
            return (
                "but with the fewest channels allowed in each group that may be cut only "
                f"{share:.0%} can go"
            )
        return self._too_many(counts, share) if share > ratio + _MISSED else ""

    @property
    def _is_uniform(self) -> bool:
        return self.request.of == "channels" and not self.request.is_global

    def _of_each_group(self, counts: Mapping[str, int], before: Mapping[str, int]) -> str:
        """Return why groups keep other fractions than asked for, but for rounding to whole channels."""
        wanted = {name: before[name] * (1 - self.request.ratio) for name in counts}
        worst = max(counts, key=lambda name: abs(counts[name] - wanted[name]))
        count, share = counts[worst], self.removed(counts)
        if abs(share - self.request.ratio) <= _MISSED or abs(count - wanted[worst]) <= 0.5:
            return ""
        is_least = count == self.options[worst][0] and count > wanted[worst]
        why = "fewest allowed" if is_least else f"allowed number nearest to {wanted[worst]:.4g}"
        went = _percent(share) if share > 0 else "none"
        return f"and {went} go: of {worst!r} {count} of {before[worst]} stay, the {why}"

    def _too_many(self, counts: Mapping[str, int], share: float) -> str:
        step = {
            name: min(o for o in self.options[name] if o > count) - count
            for name, count in counts.items()
            if count < self.options[name][-1]
        }
        axes = {group.name: group.axis for group in self.groups}
        changes = Changes(self.cost, {axes[name]: count for name, count in counts.items()})
        finest = min(step, key=lambda n: changes.total_with(axes[n], counts[n] + step[n]))
        return (
            f"and {share:.1%} go, since the numbers of channels allowed are no finer (the next step, "
            f"{step[finest]} more of {finest!r}, leaves too many)"
        )

    def advice(self) -> str:
        """Return what would come nearer, of what was not asked for."""
        finer = self.request.align != 1 and any(
            allowed_sizes(self.graph, group, 1)[0] < self.options[group.name][0]
            for group in self.groups
        )
        barred = not self.request.renormalised and any(not g.exact for g in self.graph.groups)
        more = (
            barred and self.removed({n: len(k) for n, k in self.keep.items()}) < self.request.ratio
        )
        ways = ["renormalised=True"] * more + ["align=1"] * finer
        return f"; {' or '.join(ways)} comes nearer" if ways else ""
