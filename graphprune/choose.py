"""From scores and a ratio to a plan: which groups are cut, by how much, and which of their slots go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from graphprune.cost import Cost, mac_cost, parameter_cost
from graphprune.errors import GraphPruneWarning, InvalidRequestError
from graphprune.groups import DependencyGraph, Group
from graphprune.importance import Scores
from graphprune.layout import Axis, Concat, Layout, Product, leaves, resolve, size_of
from graphprune.plan import Plan

Unit: TypeAlias = Literal["channels", "parameters", "macs"]
Align: TypeAlias = int | Literal["auto"]

# ONNX Runtime's blocked convolution kernels take channels in blocks of 8 (AVX2) or 16 (AVX-512), and
# leave them for slow ones when a count is not a multiple of 4.
CONVOLUTION_BLOCK = 8
CONVOLUTION_MULTIPLE = 4

# Torch's product of groups of rows takes matrices whose rows are multiples of 16 bytes, no others.
GROUPED_MULTIPLE = 8


@dataclass(frozen=True)
class Request:
    """What to cut: the arguments of `slim` that concern the choice.

    Attributes:
        ratio: fraction to remove, 0 <= ratio < 1.
        of: what the ratio counts: "channels" cuts every group by the same fraction; "parameters" and
            "macs" rank all channels together until that fraction of the model's total is gone.
        align: keep a multiple of this many channels where they belong to convolutions; "auto" keeps
            multiples of 8, or of 4 in groups under 16; 1 keeps any number.
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

    def __post_init__(self) -> None:
        ratio = self.ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise InvalidRequestError(
                f"ratio={ratio!r} is the fraction to remove; it must be a number with 0 <= ratio < 1"
            )
        if self.of not in ("channels", "parameters", "macs"):
            raise InvalidRequestError(f"of={self.of!r} must be 'channels', 'parameters' or 'macs'")
        if self.align != "auto" and (not isinstance(self.align, int) or self.align < 1):
            raise InvalidRequestError(
                f"align={self.align!r} must be 'auto' or a whole number from 1"
            )
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise InvalidRequestError(f"{name} must be a list of patterns, not the text alone")


def choose(
    graph: DependencyGraph, scores: Scores, request: Request, *, losses: bool = False
) -> Plan:
    """Return the plan that the request asks for; warns where it cannot be met.

    Args:
        graph: the groups to choose from.
        scores: by group, a score a slot.
        request: what to cut.
        losses: the scores are amounts of a loss, so that channels of different groups compete by loss
            for each parameter or MAC saved; else by the scores as they are.

    Raises:
        InvalidRequestError: a pattern of the request fits nothing.

    """
    groups = eligible(graph, request)
    if not groups and request.ratio > 0:
        warnings.warn(_nothing_to_cut(graph, request), GraphPruneWarning, stacklevel=3)
    options = {group.name: allowed_sizes(graph, group, request.align) for group in groups}
    if request.of == "channels":
        kept = {g.name: nearest(options[g.name], g.size * (1 - request.ratio)) for g in groups}
    else:
        cost = (parameter_cost if request.of == "parameters" else mac_cost)(graph.inference)
        priorities = _per_cost(groups, scores, cost) if losses else scores
        kept = _globally(groups, priorities, options, cost, request)
    inexact = [g.name for g in groups if not g.exact and kept[g.name] < g.size]
    if inexact:
        warnings.warn(_inexact(graph, inexact), GraphPruneWarning, stacklevel=3)
    keep = {group.name: highest(scores[group.name], kept[group.name]) for group in groups}
    asked = {"ratio": request.ratio, "of": request.of, "align": request.align}
    return Plan(keep, {group.name: group.size for group in groups}, asked)


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


def nearest(options: Sequence[int], wanted: float) -> int:
    """Return the option nearest to the wanted number, the larger of two that are equally near."""
    return min(options, key=lambda option: (abs(option - wanted), -option))


def highest(values: npt.NDArray[np.float64], count: int) -> list[int]:
    """Return the indices of the `count` highest values, in order; earlier ones win ties."""
    order = np.argsort(-values, kind="stable")[:count]
    return sorted(int(i) for i in order)


def allowed_sizes(graph: DependencyGraph, group: Group, align: Align) -> list[int]:
    """Return the numbers of slots that may be kept: multiples of the alignment, and all of them."""
    if align == "auto":
        block = CONVOLUTION_BLOCK if group.size >= 2 * CONVOLUTION_BLOCK else CONVOLUTION_MULTIPLE
    else:
        block = align
    block = _slots_for(block, _channels_a_slot(_convolution_dims(graph), group.axis))
    needed = _slots_for(GROUPED_MULTIPLE, _channels_a_slot(_grouped_dims(graph), group.axis))
    block = math.lcm(block, needed)
    return [*range(block, group.size, block), group.size]


def _slots_for(block: int, channels: Iterable[int]) -> int:
    """Return how many slots make a multiple of the block, where a slot holds that many channels."""
    return max((block // math.gcd(block, each) for each in channels), default=1)


def _channels_a_slot(dims: Iterable[Layout], axis: Axis) -> list[int]:
    """Return how many channels a slot holds, for each of the dimensions that it stands in."""
    return [channels for layout in dims for channels in _rest_of(layout, axis)]


def _convolution_dims(graph: DependencyGraph) -> list[Layout]:
    return [
        layout
        for step in graph.inference.steps
        if step.func.overloadpacket is torch.ops.aten.convolution
        for layout in (step.inputs[0].layouts[1], step.outputs[0].layouts[1])
    ]


def _grouped_dims(graph: DependencyGraph) -> list[Layout]:
    return [
        layout
        for step in graph.inference.steps
        if step.func.overloadpacket is torch.ops.aten._grouped_mm
        for value in step.inputs[:2]
        for layout in value.layouts[-2:]
    ]


def _rest_of(layout: Layout, axis: Axis) -> list[int]:
    layout = resolve(layout)
    if layout is axis:
        return [1]
    if isinstance(layout, Concat):
        return [rest for part in layout.parts for rest in _rest_of(part, axis)]
    if isinstance(layout, Product) and any(leaf is axis for leaf in leaves(layout)):
        for factor in layout.factors:
            inside = _rest_of(factor, axis)
            if inside:
                return [each * size_of(layout) // size_of(factor) for each in inside]
    return []


def _per_cost(groups: Sequence[Group], scores: Scores, cost: Cost) -> Scores:
    """Return scores over what one slot of the group costs, the lowest score of all being zero."""
    lowest = min((float(scores[g.name].min()) for g in groups if g.size), default=0.0)
    whole = cost.total()
    saved = {g.name: max(whole - cost.total({g.axis: g.size - 1}), 1) for g in groups}
    return {g.name: (scores[g.name] - min(lowest, 0.0)) / saved[g.name] for g in groups}


def _globally(
    groups: Sequence[Group],
    scores: Scores,
    options: Mapping[str, Sequence[int]],
    cost: Cost,
    request: Request,
) -> dict[str, int]:
    """Return how many slots each group keeps when all slots compete by score."""
    thresholds = np.unique(np.concatenate([[-np.inf], *(scores[g.name] for g in groups)]))
    target = cost.total() * (1 - request.ratio)

    def kept_above(threshold: float) -> dict[str, int]:
        return {
            g.name: nearest(options[g.name], float(np.count_nonzero(scores[g.name] > threshold)))
            for g in groups
        }

    def total(kept: Mapping[str, int]) -> int:
        return cost.total({g.axis: kept[g.name] for g in groups})

    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if total(kept_above(thresholds[middle])) <= target:
            high = middle
        else:
            low = middle + 1
    kept = kept_above(thresholds[low]) if request.ratio > 0 else {g.name: g.size for g in groups}
    reached = _give_back(kept, options, scores, total, target)
    if total(reached) > target and groups:
        warnings.warn(_out_of_reach(cost, total(reached), request), GraphPruneWarning, stacklevel=4)
    return reached


def _give_back(
    kept: dict[str, int],
    options: Mapping[str, Sequence[int]],
    scores: Scores,
    total: Callable[[Mapping[str, int]], int],
    target: float,
) -> dict[str, int]:
    """Return the best-scored slots that still fit under the target: rounding removed a few too many."""
    best = {name: np.sort(scores[name])[::-1] for name in kept}
    waiting = {name for name in kept if kept[name] < options[name][-1]}
    while waiting:
        name = max(sorted(waiting), key=lambda n: best[n][kept[n]])
        larger = {**kept, name: min(o for o in options[name] if o > kept[name])}
        if total(larger) > target:
            waiting.discard(name)
            continue
        kept = larger
        if kept[name] == options[name][-1]:
            waiting.discard(name)
    return kept


def _out_of_reach(cost: Cost, left: int, request: Request) -> str:
    removed = 1 - left / max(cost.total(), 1)
    return (
        f"asked to remove {request.ratio:.0%} of {request.of}, but with at least one channel left in each "
        f"group that may be cut only {removed:.0%} can go; renormalised=True or align=1 may free more"
    )
