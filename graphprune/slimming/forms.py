"""A plan carried out: the slim model in its own class or as a graph, whichever works, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from torch import fx, nn

from graphprune.capture.capture import difference_on, graph_of, is_aten_graph
from graphprune.errors import (
    CaptureError,
    GraphPruneError,
    OtherOperatorsError,
    PlanError,
    VerificationError,
    listed,
    warn,
)
from graphprune.inference.infer import infer
from graphprune.inference.recorded import OtherRun
from graphprune.inspection.dependency_graph import DependencyGraph
from graphprune.layout import Axis
from graphprune.masks import Mask, count_kept_slots
from graphprune.report.result import Slimmed
from graphprune.selection.plan import Plan
from graphprune.shrink.graph_literals import rewrite_literals
from graphprune.shrink.held_numbers import HeldNumber
from graphprune.shrink.held_sizes import (
    as_predicate,
    axes_given_as_sizes,
    keep_what_works,
    put_sizes,
    try_sizes,
)
from graphprune.shrink.module_attributes import DESCRIBED_CLASSES
from graphprune.shrink.tensors import shrink_module
from graphprune.shrink.ties import AmbiguousSize, Ties, infer_ties
from graphprune.utils.inputs import Inputs
from graphprune.utils.tensors import forget_derived
from graphprune.verify import Run, Verification, check_runs, silenced_copy, verify

Form: TypeAlias = Literal["auto", "module", "graph"]


@dataclass(frozen=True)
class Job:
    """What is the same for every form that is tried.

    Attributes:
        module: the model, never changed.
        inputs: its example inputs.
        plan_for: gives the plan for a dependency graph of the model.
        check: whether to verify the result.

    """

    module: nn.Module
    inputs: Inputs
    plan_for: Callable[[DependencyGraph], Plan]
    check: bool


def in_form(form: Form, job: Job) -> Slimmed:
    """Return the slim model in the form that was asked for, or for "auto" the first that works."""
    if is_aten_graph(job.module):
        return as_graph(job, "the model is a graph")
    if form == "graph":
        others = infer(job.module, job.inputs, at_other_sizes=True).others if job.check else []
        return as_graph(job, "asked for", others)
    graph = DependencyGraph(infer(job.module, job.inputs, at_other_sizes=job.check))
    plan = job.plan_for(graph)
    if form == "auto":
        strategies = STRATEGIES
    else:
        strategies = STRATEGIES[:1] if job.check else UNCHECKED_MODULE_STRATEGIES
    failure = GraphPruneError("no strategy was tried")
    for strategy, gives_up_with in strategies:
        try:
            return strategy(job, graph, plan, failure)
        except gives_up_with as reason:
            failure = reason
    raise failure


def as_module(
    job: Job, graph: DependencyGraph, plan: Plan, *, other_operators: bool = False
) -> Slimmed:
    """Return the model's own class with smaller tensors.

    Args:
        job: the model and its inputs.
        graph: its dependency graph.
        plan: what to keep.
        other_operators: where nothing is verified, whether its operators may give other sizes than the
            original's would, as those of a model do that was verified earlier and takes another way.

    Raises:
        VerificationError: its code does not follow: it holds a size that no attribute gives.

    """
    masks = plan.masks(graph)
    slimmer = shrink_module(job.module, graph.inference, masks)
    forget_derived(slimmer)

    def check() -> Verification | None:
        if job.check:
            return _verify(job, job.module, slimmer, plan, graph)
        kept = None if other_operators else count_kept_slots(masks)
        check_runs(slimmer, job.inputs, graph.inference, kept)
        return None

    # Sizes that are told to follow are changed at once. Where the model is wrong then, they are put back,
    # and those that forward needs are found by trying.
    ties = infer_ties(
        slimmer, graph.inference, count_kept_slots(masks), DESCRIBED_CLASSES, compared=job.check
    )
    put_sizes(slimmer, ties.sizes)
    unclear = ties.ambiguous
    try:
        verification = check()
    except VerificationError:
        put_sizes(slimmer, {number: number.value for number in ties.sizes})
        verification, unclear = _check_with_sizes(job, slimmer, plan, graph, check, ties)
    if masks:
        _warn_of_unused(graph, "they keep their sizes and may no longer fit where they are used")
    ambiguous = _report_ambiguous(unclear)
    return Slimmed(
        slimmer, plan, graph, job.inputs, "module", "", verification, ambiguous_sizes=ambiguous
    )


def _check_with_sizes(
    job: Job,
    slimmer: nn.Module,
    plan: Plan,
    graph: DependencyGraph,
    check: Callable[[], Verification | None],
    ties: Ties,
) -> tuple[Verification | None, dict[HeldNumber, tuple[int, ...]]]:
    """Change sizes that the slim modules hold until the model verifies, then the others that are told.

    Returns:
        What was compared, and what the numbers that were left may be.

    Raises:
        VerificationError: it never does; what it says is of the model as it was cut.

    """
    changed: dict[HeldNumber, int] = {}
    try:
        verification = check()
    except VerificationError as failure:
        verification, changed = _follow_sizes(job, slimmer, plan, graph, check, failure)
    unchanged = {
        number: size
        for number, size in ties.sizes.items()
        if changed.get(number, number.value) == number.value
    }
    left = keep_what_works(slimmer, unchanged, as_predicate(check))
    unclear = {
        number: sizes
        for number, sizes in ties.ambiguous.items()
        if changed.get(number, number.value) == number.value
    }
    had_to_stay = {number: tuple(sorted((number.value, unchanged[number]))) for number in left}
    return verification, unclear | had_to_stay


def _follow_sizes(
    job: Job,
    slimmer: nn.Module,
    plan: Plan,
    graph: DependencyGraph,
    check: Callable[[], Verification | None],
    failure: VerificationError,
) -> tuple[Verification | None, dict[HeldNumber, int]]:
    """Change sizes that the slim modules hold until the model verifies.

    Returns:
        What was compared, and the numbers as they are now.

    Raises:
        VerificationError: the given failure, where it never does.

    """
    for sizes in try_sizes(slimmer, graph.inference, count_kept_slots(plan.masks(graph))):
        try:
            check_runs(slimmer, job.inputs, graph.inference)
            return check(), sizes
        except VerificationError:
            continue
    raise failure from None


def _report_ambiguous(unclear: Mapping[HeldNumber, tuple[int, ...]]) -> tuple[AmbiguousSize, ...]:
    """Return the numbers that were left; warn of those that are no size of anything now."""
    ambiguous = tuple(
        AmbiguousSize(str(number), number.value, sizes) for number, sizes in unclear.items()
    )
    stale = [str(size) for size in ambiguous if size.is_of_nothing]
    if stale:
        warn(
            f"{listed(stale)}: sizes that modules hold and that stay as they were, since the dimensions "
            "that they may be of differ now; forward does not need them, but set them if other methods do"
        )
    return ambiguous


def as_module_with_fewer_groups(
    job: Job, graph: DependencyGraph, plan: Plan, untraceable: GraphPruneError
) -> Slimmed:
    """Return the model's own class, cut only where no size in its code could be in the way.

    The heads of nn.MultiheadAttention are cut where that works: most of its sizes follow.

    Raises:
        GraphPruneError: why the graph form failed, where that leaves nothing to cut or the code does not
            follow all the same.

    """
    sizes = count_kept_slots(plan.masks(graph))
    for of_attention in (False, True):
        axes = axes_given_as_sizes(job.module, graph.inference, sizes, of_attention=of_attention)
        whole = sorted(graph.by_axis[axis].name for axis in axes)
        smaller_plan = plan.without(whole)
        if not whole or not smaller_plan.removed:
            continue
        try:
            result = as_module(job, graph, smaller_plan)
        except VerificationError:
            continue
        warn(
            f"{listed(whole)} stay whole: the model's code may hold their sizes as numbers, which "
            "cannot be rewritten, since torch.export cannot trace it"
        )
        return result
    raise untraceable


def as_graph(job: Job, why: str, others: Sequence[OtherRun] = ()) -> Slimmed:
    """Return a graph of the model with smaller tensors and every size in it rewritten.

    Args:
        job: the model and its inputs.
        why: what asks for a graph.
        others: runs of the model at other sizes of its inputs, at which the graph should be right too.

    Raises:
        CaptureError: the model cannot be traced.
        VerificationError: the graph is not what it should be.

    """
    try:
        module = graph_of(job.module, job.inputs)
    except GraphPruneError as failure:
        raise type(failure)(f"{failure}\nThe graph form was needed because: {why}") from failure
    graph = DependencyGraph(infer(module, job.inputs, at_other_sizes=job.check))
    plan = job.plan_for(graph)
    masks = plan.masks(graph)
    slimmer = shrink_module(module, graph.inference, masks)
    kept = count_kept_slots(masks)
    rewrite_literals(cast(fx.GraphModule, slimmer), graph.inference, kept)
    verification = _check(job, module, slimmer, plan, graph)
    slimmer.train(job.module.training)
    if module is not job.module:
        _warn_of_unused(graph, "the graph holds them but has no code that uses them")
        _warn_of_sizes(job, module, others)
    return Slimmed(slimmer, plan, graph, job.inputs, "graph", why, verification)


def _warn_of_sizes(job: Job, graph_module: fx.GraphModule, others: Sequence[OtherRun]) -> None:
    """Warn where a graph, before the cut, is not what the model is at other sizes of the inputs."""
    differences = ((o.inputs, difference_on(job.module, graph_module, o.inputs)) for o in others)
    for inputs, difference in differences:
        if difference:
            warn(
                f"the graph form fits inputs like the example's, {job.inputs}: on {inputs}, which the "
                f"model takes, {difference}; pass example_inputs of the sizes that you need"
            )
            return


def _warn_of_unused(graph: DependencyGraph, consequence: str) -> None:
    names = [name for name in graph.inference.unused if name in graph.inference.trainable]
    if names:
        warn(
            f"the example inputs reach no operator that reads {listed(names)}: {consequence}; "
            "pass example_inputs that reach them if you need them"
        )


def _check(
    job: Job, module: nn.Module, slimmer: nn.Module, plan: Plan, graph: DependencyGraph
) -> Verification | None:
    """Verify; where that is not asked for or not possible, see that the slim model runs at all."""
    if job.check:
        return _verify(job, module, slimmer, plan, graph)
    check_runs(slimmer, job.inputs, graph.inference)
    return None


def _verify(
    job: Job, module: nn.Module, slimmer: nn.Module, plan: Plan, graph: DependencyGraph
) -> Verification:
    """Verify; where values decide which operators run, analyse the model once more, silenced, on data."""
    masks = plan.masks(graph)
    try:
        run = Run(job.inputs, graph.inference, masks)
        return verify(module, slimmer, run, list(_at_other_sizes(graph, masks)))
    except OtherOperatorsError as other:
        silenced = silenced_copy(module, graph.inference, masks, {})
        on_data = DependencyGraph(infer(silenced, job.inputs, with_data=True))
        used = plan.without(_find_unused_groups(on_data, plan, graph))
        try:
            masks = used.masks(on_data)
        except PlanError:  # sizes follow values too
            raise other from None
        return verify(module, slimmer, Run(job.inputs, on_data.inference, masks), as_it_is=True)


def _at_other_sizes(graph: DependencyGraph, masks: Mapping[Axis, Mask]) -> Iterator[Run]:
    """Yield what to verify at other sizes of the inputs, where the original takes any.

    Raises:
        VerificationError: the slim model is what it should be at the sizes of the example alone.

    """
    for other in graph.inference.others:
        _check_same_axes(graph, masks, other)
        there = {other.axes[axis]: mask for axis, mask in masks.items() if axis in other.axes}
        yield Run(other.inputs, other.inference, there)


def _check_same_axes(graph: DependencyGraph, masks: Mapping[Axis, Mask], other: OtherRun) -> None:
    unknown = other.inference.unknown_here
    unlike = [
        graph.by_axis[axis].name
        for axis in masks
        if axis not in other.axes
        and any(m.parameter not in unknown for m in graph.by_axis[axis].members)
    ]
    if unlike:
        raise VerificationError(
            f"{listed(unlike)} are cut, but their channels go together only at the sizes of the example "
            f"inputs, not on {other.inputs}"
        )


def _find_unused_groups(on_data: DependencyGraph, plan: Plan, graph: DependencyGraph) -> list[str]:
    """Return the groups that are cut and that the values of the example inputs do not reach."""
    unused = set(on_data.inference.unused)
    names = [
        name
        for name in plan.keep
        if all(member.parameter in unused for member in graph.by_name[name].members)
    ]
    if names:
        warn(
            f"{listed(names)} are cut but not compared: with the values of the example inputs the model "
            "does not use them (experts that no token goes to, say); pass example_inputs that do"
        )
    return names


Strategy: TypeAlias = Callable[[Job, DependencyGraph, Plan, GraphPruneError], Slimmed]
"""Carries a plan out in one form, given how the strategy before it failed."""

# How a plan is carried out, and the error after which the next strategy is tried.
STRATEGIES: tuple[tuple[Strategy, type[GraphPruneError]], ...] = (
    # The model's own class: tensors sliced, and the sizes that its modules hold made true.
    (lambda job, graph, plan, _: as_module(job, graph, plan), VerificationError),
    # A graph, in which every size is an argument that can be rewritten: for code that writes sizes down.
    (lambda job, graph, _, why: as_graph(job, str(why), graph.inference.others), CaptureError),
    # The class again, less the groups whose sizes its code may hold: for code that nothing can trace.
    (as_module_with_fewer_groups, CaptureError),
)

# Where the class is asked for and nothing verified, a model that takes another way is taken at its word.
UNCHECKED_MODULE_STRATEGIES: tuple[tuple[Strategy, type[GraphPruneError]], ...] = (
    STRATEGIES[0],
    (
        lambda job, graph, plan, _: as_module(job, graph, plan, other_operators=True),
        VerificationError,
    ),
)
