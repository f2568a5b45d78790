"""What is said where a request cannot be met, or not exactly: why, and what would come nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphprune.errors import listed
from graphprune.groups.cost import Amount
from graphprune.groups.groups import Dependencies, Group
from graphprune.groups.name_patterns import Selection
from graphprune.selection.allocation import Changes, allowed_sizes
from graphprune.selection.request import Request

# A target that is missed by more than this share of the total is worth a warning.
_MISSED = 0.02

# Shares are sums of floating-point numbers: targets leave them this much.
ROUNDING = 1e-9


def why_nothing_is_cut(graph: Dependencies, selected: Selection) -> str:
    """Return what keeps every group of a model from being cut."""
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


def why_inexact(graph: Dependencies, names: Sequence[str]) -> str:
    """Return which operators take a statistic over channels of the groups named."""
    operators = {r.operator for n in names for r in graph.by_name[n].renormalised}
    return (
        f"{', '.join(sorted(operators))} takes a statistic over channels that are cut, now over fewer of "
        f"them, so the slim model differs from the silenced original; groups: {listed(names)}"
    )


def percent(share: float) -> str:
    """Return a share in percent, to four digits."""
    return f"{100 * share:.4g}%"


@dataclass(frozen=True)
class Shortfall:
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
        kept = {group.axis: counts[group.name] for group in self.groups}
        return 1 - self.cost.total(kept) / max(self.total, 1)

    def why(self, before: Mapping[str, int]) -> str:
        """Return how far the target is missed and why; "" where it is met.

        Args:
            before: by group, how many slots it had before any cut.

        """
        counts = {group.name: len(self.keep[group.name]) for group in self.groups}
        share, ratio = self.removed(counts), self.request.ratio
        if self.request.is_by_group:
            return self._of_each_group(counts, before)
        if share < ratio - ROUNDING:
            return (
                "but with the fewest channels allowed in each group that may be cut only "
                f"{share:.0%} can go"
            )
        return self._too_many(counts, share) if share > ratio + _MISSED else ""

    def _of_each_group(self, counts: Mapping[str, int], before: Mapping[str, int]) -> str:
        """Return why groups keep other fractions than asked for, but for rounding to whole channels."""
        targets = {name: before[name] * (1 - self.request.ratio) for name in counts}
        worst = max(counts, key=lambda name: abs(counts[name] - targets[name]))
        count, share = counts[worst], self.removed(counts)
        if abs(share - self.request.ratio) <= _MISSED or abs(count - targets[worst]) <= 0.5:
            return ""
        is_least = count == self.options[worst][0] and count > targets[worst]
        why = "fewest allowed" if is_least else f"allowed number nearest to {targets[worst]:.4g}"
        went = percent(share) if share > 0 else "none"
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
