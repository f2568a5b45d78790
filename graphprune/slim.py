"""`slim`: the stages in order, from a model and a ratio to a smaller model that was checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphprune.allocation import Align
from graphprune.attributes import axes_given_as_sizes, ways_to_follow_sizes
from graphprune.calibration import batches_of
from graphprune.capture import graph_of, is_aten_graph, prepared, reexported
from graphprune.choose import Ranking, Request, Unit, Whole, choose
from graphprune.compensation import Compensation, Method, compensated, method_of
from graphprune.errors import (
    CaptureError,
    GraphPruneError,
    GraphPruneWarning,
    InvalidRequestError,
    OtherOperatorsError,
    PlanError,
    VerificationError,
)
from graphprune.groups import DependencyGraph
from graphprune.importance import Importance, Loss, Scores, Subject, are_losses, scores
from graphprune.inference import infer
from graphprune.inputs import Inputs
from graphprune.layout import counts_of
from graphprune.literals import rewrite_literals
from graphprune.plan import Plan
from graphprune.shrink import shrunk
from graphprune.state import forget_derived, named_tensors
from graphprune.verify import Verification, check_runs, silenced_copy, verify, without

Form: TypeAlias = Literal["auto", "module", "graph"]


@dataclass(frozen=True)
class Slimmed:
    """A slim model and how it came about.

    Attributes:
        model: the slim model.
        plan: which channels stayed.
        graph: the dependency graph that the plan is about.
        inputs: the example inputs that were used, given or guessed.
        form: "module" (the model's own class) or "graph" (an fx.GraphModule).
        why_graph: for a graph, what kept the module form from working; else "".
        verification: what was compared, or None where that was not asked for or not possible.
        compensation: what the repair did, or None where none was asked for.

    """

    model: nn.Module
    plan: Plan
    graph: DependencyGraph
    inputs: Inputs
    form: str
    why_graph: str
    verification: Verification | None
    compensation: Compensation | None = None


class Options(TypedDict, total=False):
    """The keyword arguments of `slim`, which says what they mean."""

    of: Unit
    importance: Importance
    ranking: Ranking
    steps: int
    align: Align
    include: Sequence[str]
    exclude: Sequence[str]
    renormalised: bool
    plan: Plan | None
    form: Form
    verify: bool
    seed: int
    data: Any
    loss: Loss | None
    compensate: bool | Method


@dataclass(frozen=True)
class Order:
    """What is asked of `slim`: the request, and the other options."""

    request: Request
    importance: Importance = "l2"
    plan: Plan | None = None
    form: Form = "auto"
    verify: bool = True
    seed: int = 0
    data: Any = None
    loss: Loss | None = None
    compensate: bool | Method = False

    @classmethod
    def of(cls, ratio: float, options: Options) -> Order:
        """Return the order for a ratio and options.

        Raises:
            TypeError: there is no such option.
            InvalidRequestError: an option makes no sense.

        """
        unknown = sorted(options.keys() - Options.__annotations__)
        if unknown:
            raise TypeError(f"there is no option {unknown[0]!r}; see graphprune.slim")
        given: dict[str, Any] = dict(options)
        asked = {f.name: given.pop(f.name) for f in fields(Request) if f.name in given}
        return cls(Request(ratio, **asked), **given)


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


def slim(
    model: Any,
    ratio: float = 0.5,
    example_inputs: Any = None,
    *,
    of: Unit = "channels",
    importance: Importance = "l2",
    ranking: Ranking = "auto",
    steps: int = 1,
    align: Align = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renormalised: bool = False,
    plan: Plan | None = None,
    form: Form = "auto",
    verify: bool = True,
    seed: int = 0,
    data: Any = None,
    loss: Loss | None = None,
    compensate: bool | Method = False,
) -> Any:
    """Return a smaller copy of a model, checked against the original; the original is not changed.

    Args:
        model: an nn.Module, fx.GraphModule or torch.export.ExportedProgram.
        ratio: fraction to remove, 0 <= ratio < 1, counted in what `of` names.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments or
            `graphprune.Inputs`; may be left out for image, vector, sequence and token models.
        of: "channels" of the groups that may be cut, "parameters" or "macs" of the whole model.
        importance: what makes a channel matter. By the weights: "l2", "l1", "lamp", "bn_scale",
            "random". By what the loss on `data` does without it: "taylor" and "taylor2" (first and
            second order; "taylor2_recursion" with the paper's second derivatives), "fisher", "obs",
            "oracle" (brute force). By `data` alone: "reconstruction" (the error that a repair would
            leave), "interpolative" (what other channels cannot express). Or a function from
            model and dependency graph to scores, such as a `sensitivity` scan.
            `graphprune.importance.CRITERIA` has a docstring for each.
        ranking: "uniform" removes the same fraction of each group; "global" ranks the channels of all
            groups together: by score, or where scores are amounts of a loss by loss for each channel,
            parameter or MAC; "auto" is uniform for channels and global for the others.
        steps: 1 scores the channels once; more approach the ratio in so many steps and score what is
            left anew after each, without any training.
        align: numbers of convolution channels to keep: "auto" for what ONNX Runtime runs fast
            (multiples of 8, of 4 in groups under 16), or a number; 1 for any.
        include: cut only groups whose name or a member parameter's name fits one of these globs.
        exclude: do not cut groups whose name or a member parameter's name fits one of these globs.
        renormalised: also cut channels along which a norm, mean or softmax runs; the slim model then
            differs from the silenced original by that statistic, and a warning names the groups.
        plan: cut exactly this instead of choosing.
        form: "module" keeps the model's class and code, and changes sizes that its modules hold as
            attributes where they have to follow; "graph" gives an fx.GraphModule whose sizes are
            rewritten; "auto" prefers the first where it works.
        verify: compare with the original, removed channels silenced, in float64; without it, the
            slim model is only seen to run.
        seed: for importance "random".
        data: batches, a few hundred samples in all: a list, a DataLoader or another iterable of the
            model's inputs or of pairs of inputs and target.
        loss: from the model's output and a batch's target to one number, as F.cross_entropy is.
        compensate: change the weights that stay so that each layer gives what it gave before, on
            `data` (whose targets are not used): True or "least_squares" for weights and biases,
            "constants" for biases alone. The slim model is verified before that.

    Returns:
        An nn.Module; for an ExportedProgram, an ExportedProgram.

    Raises:
        InvalidRequestError: an argument makes no sense.
        CaptureError: the model does not run on the inputs, or cannot be traced where that is needed.
        VerificationError: the slim model is not what it should be; none is returned.

    """
    result = slimmed(
        model, ratio, example_inputs, of=of, importance=importance, ranking=ranking, steps=steps,
        align=align, include=include, exclude=exclude, renormalised=renormalised, plan=plan,
        form=form, verify=verify, seed=seed, data=data, loss=loss, compensate=compensate,
    )  # fmt: skip
    if isinstance(model, ExportedProgram):
        return reexported(model, result.model, example_inputs)
    return result.model


def slimmed(
    model: Any, ratio: float = 0.5, example_inputs: Any = None, **options: Unpack[Options]
) -> Slimmed:
    """Return what `slim` returns together with its plan, graph, form, verification and repair.

    Takes the arguments of `slim`.
    """
    return carried_out(Order.of(ratio, options), model, example_inputs)


@torch.inference_mode(False)
def carried_out(
    order: Order, model: Any, example_inputs: Any, whole: Whole | None = None
) -> Slimmed:
    """Return the slim model that was ordered; `whole` is what it is a part of, if cut before."""
    if order.form not in ("auto", "module", "graph"):
        raise InvalidRequestError(f"form={order.form!r} must be 'auto', 'module' or 'graph'")
    method = method_of(order.compensate)
    module, inputs = prepared(model, example_inputs)
    has_data = not any(tensor.is_meta for tensor in named_tensors(module).values())
    batches = None if order.data is None else batches_of(order.data)
    chosen: dict[tuple[Any, ...], Plan] = {}

    def plan_for(graph: DependencyGraph) -> Plan:
        if order.plan is not None:
            return order.plan

        def scored(gone: Plan | None) -> Scores:
            left = module if gone is None else without(module, graph.inference, gone.masks(graph))
            subject = Subject(left, graph, batches, order.loss, order.seed)
            return scores(subject, order.importance)

        groups = tuple((g.name, g.size, g.exact, g.inner) for g in graph.groups)
        if groups not in chosen:  # a second form that is tried has the groups of the first
            losses = are_losses(order.importance)
            chosen[groups] = choose(graph, scored, order.request, losses=losses, whole=whole)
        return chosen[groups]

    result = in_form(order.form, Job(module, inputs, plan_for, order.verify and has_data))
    if method is None:
        return result
    repair = compensated(module, result.model, result.plan, inputs, batches, method)
    return replace(result, compensation=repair)


def in_form(form: Form, job: Job) -> Slimmed:
    """Return the slim model in the form that was asked for, or for "auto" the first that works."""
    if is_aten_graph(job.module):
        return as_graph(job, "the model is a graph")
    if form == "graph":
        return as_graph(job, "asked for")
    graph = DependencyGraph(infer(job.module, job.inputs))
    chosen = job.plan_for(graph)
    try:
        return as_module(job, graph, chosen)
    except VerificationError as failure:
        if form == "module":
            raise
        try:
            return as_graph(job, str(failure))
        except CaptureError as untraceable:
            return as_module_with_sizes(job, graph, chosen, untraceable)


def as_module(job: Job, graph: DependencyGraph, plan: Plan) -> Slimmed:
    """Return the model's own class with smaller tensors.

    Raises:
        VerificationError: its code does not follow: it holds a size that no attribute gives.

    """
    masks = plan.masks(graph)
    slimmer = shrunk(job.module, graph.inference, masks)
    forget_derived(slimmer)
    try:
        seen = _checked(job, job.module, slimmer, plan, graph)
    except VerificationError as failure:
        seen = _checked_with_sizes(job, slimmer, plan, graph, failure)
    if masks:
        _warn_of_unused(graph, "they keep their sizes and may no longer fit where they are used")
    return Slimmed(slimmer, plan, graph, job.inputs, "module", "", seen)


def _checked_with_sizes(
    job: Job, slimmer: nn.Module, plan: Plan, graph: DependencyGraph, failure: VerificationError
) -> Verification | None:
    """Change sizes that the slim modules hold as attributes until the model verifies.

    Raises:
        VerificationError: the given failure, where it never does.

    """
    for _ in ways_to_follow_sizes(slimmer, graph.inference, counts_of(plan.masks(graph))):
        try:
            check_runs(slimmer, job.inputs, graph.inference)
            return _verified(job, job.module, slimmer, plan, graph) if job.check else None
        except VerificationError:
            continue
    raise failure from None


def as_module_with_sizes(
    job: Job, graph: DependencyGraph, plan: Plan, untraceable: CaptureError
) -> Slimmed:
    """Return the model's own class, cut only where no size in its code could be in the way.

    Raises:
        CaptureError: that leaves nothing to cut, or the code does not follow all the same.

    """
    sizes = counts_of(plan.masks(graph))
    held = axes_given_as_sizes(job.module, graph.inference, sizes)
    whole = sorted(graph.by_axis[axis].name for axis in held)
    rest = plan.without(whole)
    if not rest.removed:
        raise untraceable
    try:
        result = as_module(job, graph, rest)
    except VerificationError:
        raise untraceable from None
    warnings.warn(
        f"{_listed(whole)} stay whole: the model's code may hold their sizes as numbers, which "
        "cannot be rewritten, since torch.export cannot trace it",
        GraphPruneWarning,
        stacklevel=3,
    )
    return result


def as_graph(job: Job, why: str) -> Slimmed:
    """Return a graph of the model with smaller tensors and every size in it rewritten.

    Raises:
        CaptureError: the model cannot be traced.
        VerificationError: the graph is not what it should be.

    """
    try:
        module = graph_of(job.module, job.inputs)
    except GraphPruneError as failure:
        raise type(failure)(f"{failure}\nThe graph form was needed because: {why}") from failure
    graph = DependencyGraph(infer(module, job.inputs))
    plan = job.plan_for(graph)
    masks = plan.masks(graph)
    slimmer = shrunk(module, graph.inference, masks)
    kept = counts_of(masks)
    rewrite_literals(cast(fx.GraphModule, slimmer), graph.inference, kept)
    seen = _checked(job, module, slimmer, plan, graph)
    slimmer.train(job.module.training)
    if module is not job.module:
        _warn_of_unused(graph, "the graph holds them but has no code that uses them")
    return Slimmed(slimmer, plan, graph, job.inputs, "graph", why, seen)


def _warn_of_unused(graph: DependencyGraph, consequence: str) -> None:
    names = [name for name in graph.inference.unused if name in graph.inference.trainable]
    if names:
        warnings.warn(
            f"the example inputs reach no operator that reads {_listed(names)}: {consequence}; "
            "pass example_inputs that reach them if you need them",
            GraphPruneWarning,
            stacklevel=4,
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _checked(
    job: Job, module: nn.Module, slimmer: nn.Module, plan: Plan, graph: DependencyGraph
) -> Verification | None:
    """Verify; where that is not asked for or not possible, see that the slim model runs at all."""
    if job.check:
        return _verified(job, module, slimmer, plan, graph)
    check_runs(slimmer, job.inputs, graph.inference)
    return None


def _verified(
    job: Job, module: nn.Module, slimmer: nn.Module, plan: Plan, graph: DependencyGraph
) -> Verification:
    """Verify; where values decide which operators run, analyse the model once more, silenced, on data."""
    masks = plan.masks(graph)
    try:
        return verify(module, slimmer, job.inputs, graph.inference, masks)
    except OtherOperatorsError as other:
        silenced = silenced_copy(module, graph.inference, masks, {})
        on_data = DependencyGraph(infer(silenced, job.inputs, with_data=True))
        used = plan.without(_not_used(on_data, plan, graph))
        try:
            masks = used.masks(on_data)
        except PlanError:  # sizes follow values too
            raise other from None
        return verify(module, slimmer, job.inputs, on_data.inference, masks, as_it_is=True)


def _not_used(on_data: DependencyGraph, plan: Plan, graph: DependencyGraph) -> list[str]:
    """Return the groups that are cut and that the values of the example inputs do not reach."""
    unused = set(on_data.inference.unused)
    names = [
        name
        for name in plan.keep
        if all(member.parameter in unused for member in graph.by_name[name].members)
    ]
    if names:
        warnings.warn(
            f"{_listed(names)} are cut but not compared: with the values of the example inputs the model "
            "does not use them (experts that no token goes to, say); pass example_inputs that do",
            GraphPruneWarning,
            stacklevel=4,
        )
    return names
