"""From scores and a ratio to a plan: which groups are cut, by how much, and which of their slots go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphprune.errors import warn
from graphprune.groups.cost import Amount, Cost, mac_cost, parameter_cost
from graphprune.groups.groups import Dependencies, Group, Scores
from graphprune.groups.name_patterns import Selection
from graphprune.selection.allocation import (
    allocate_by_score,
    allowed_sizes,
    nearest,
    per_cost,
    quantiles,
)
from graphprune.selection.plan import Plan
from graphprune.selection.request import Request, Unit
from graphprune.selection.shortfall import (
    ROUNDING,
    Shortfall,
    percent,
    why_inexact,
    why_nothing_is_cut,
)


@dataclass(frozen=True)
class Baseline:
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
    def of(cls, graph: Dependencies, request: Request, total: float | None = None) -> Baseline:
        """Return what the request counts from where the graph is that of the model before any cut."""
        groups = eligible(graph, request)
        if total is None:
            total = _cost(graph, groups, request.of).total()
        return cls(
            {group.name: group.size for group in groups},
            {group.name: allowed_sizes(graph, group, request.align) for group in groups},
            total,
        )

    def or_before(self, before: Baseline | None) -> Baseline:
        """Return what counts where the model was cut before: the numbers of then, if there are any."""
        if before is None:
            return self
        sizes, options = self.sizes | before.sizes, self.options | before.options
        return Baseline(sizes, options, before.total)


def choose(
    graph: Dependencies,
    scores_without: Callable[[Plan | None], Scores],
    request: Request,
    *,
    losses: bool = False,
    baseline: Baseline | None = None,
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
        baseline: what the ratio is a fraction of, where the graph is of a model that was cut before.
        cost: what the ratio counts, where that is no count of channels, parameters or MACs.
        final: whether no further cut follows, which would come nearer to what is wanted in the end.

    Raises:
        InvalidRequestError: a pattern of the request fits nothing.

    """
    selected = selection(graph, request)
    groups = [group for group in graph.groups if selected.may_cut(group)]
    if baseline is None:  # of several cuts the first says it
        _warn_of_overruled(selected)
    if not groups and request.ratio > 0:
        warn(why_nothing_is_cut(graph, selected))
    cost = cost or _cost(graph, groups, request.of)
    baseline = Baseline.of(graph, request, cost.total()).or_before(baseline)
    choice = _Choice(groups, request, losses, baseline, cost)
    keep = choice.kept_slots(scores_without)
    inexact = [g.name for g in groups if not g.exact and len(keep[g.name]) < g.size]
    if inexact:
        warn(why_inexact(graph, inexact))
    if groups and final and request.of != "latency":  # of which the measurement will tell
        shortfall = Shortfall(graph, groups, choice.options, keep, cost, baseline.total, request)
        why = shortfall.why(baseline.sizes)
        if why:
            warn(
                f"asked to remove {percent(request.ratio)} of {request.of}, {why}{shortfall.advice()}"
            )
    settings = ("ratio", "of", "ranking", "steps", "align")
    return Plan(keep, choice.sizes, {name: getattr(request, name) for name in settings})


class _Choice:
    """How many slots each group keeps, and which: a request, applied to groups that it lets be cut."""

    def __init__(
        self,
        groups: Sequence[Group],
        request: Request,
        losses: bool,
        baseline: Baseline,
        cost: Amount,
    ) -> None:
        self.groups, self.request, self.losses = groups, request, losses
        self.baseline, self.cost = baseline, cost
        self.sizes = {group.name: group.size for group in groups}
        # What may be kept: the numbers allowed before any cut, as far as they are left, and all slots.
        self.options = {
            name: [option for option in baseline.options[name] if option < size] + [size]
            for name, size in self.sizes.items()
        }

    def kept_slots(self, scores_without: Callable[[Plan | None], Scores]) -> dict[str, list[int]]:
        """Return the slots that each group keeps, scored anew at every step towards the ratio."""
        keep = {name: list(range(size)) for name, size in self.sizes.items()}
        for step in range(1, self.request.steps + 1):
            plan = Plan(keep, self.sizes) if step > 1 else None  # what the steps before have left
            scores = _of_what_is_left(scores_without(plan), keep)
            share = 1 - self.request.ratio * step / self.request.steps
            counts = self._counts(scores, keep, share)
            keep = {name: highest(scores[name], count) for name, count in counts.items()}
        return keep

    def _counts(
        self, scores: Scores, keep: Mapping[str, Sequence[int]], share: float
    ) -> dict[str, int]:
        """Return how many slots each group keeps where the share given is to be left of the whole."""
        if self.request.is_by_group:
            return {
                name: nearest(options, self.baseline.sizes[name] * share)
                for name, options in self.options.items()
            }
        if not self.request.is_global:
            # Quantiles instead of scores: the lowest tenth of each group goes before the second of any.
            scores = quantiles(scores)
        elif self.losses:
            counts = {name: len(slots) for name, slots in keep.items()}
            scores = per_cost(self.groups, scores, self.options, self.cost, counts)
        target = self.baseline.total * (share + ROUNDING)
        return allocate_by_score(self.groups, scores, self.options, self.cost, target)


def _warn_of_overruled(selected: Selection) -> None:
    why = selected.why_overruled()
    if why:
        warn(why)


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
    """Return which groups a request names, its modules by their names (`Request.with_names`).

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


def highest(values: npt.NDArray[np.float64], count: int) -> list[int]:
    """Return the indices of the `count` highest values, in order; earlier ones win ties."""
    order = np.argsort(-values, kind="stable")[:count]
    return sorted(int(i) for i in order)
