"""`slim`: the stages in order, from a model and a ratio to a smaller model that was checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from graphprune.calibration.batches import Share, batches_of
from graphprune.capture.capture import normalize_model_and_inputs, reexport
from graphprune.compensation import Method, compensate_model, method_of
from graphprune.distributed.process_group import join_call
from graphprune.errors import GraphPruneWarning, InvalidRequestError
from graphprune.groups.cost import Amount
from graphprune.groups.groups import Scores
from graphprune.groups.name_patterns import Pattern
from graphprune.importance import Importance, Loss, ScoringContext, are_losses, scores
from graphprune.importance.magnitude import BY_WEIGHTS
from graphprune.inspection.dependency_graph import DependencyGraph
from graphprune.onnx_export.providers import Runtime
from graphprune.report.result import Slimmed
from graphprune.runtime.latency import NANO, Bench, LatencyModel
from graphprune.selection.allocation import Align
from graphprune.selection.choose import Baseline, choose
from graphprune.selection.plan import Plan
from graphprune.selection.request import Ranking, Request, Unit
from graphprune.slimming.forms import Form, Job, in_form
from graphprune.slimming.latency_target import calibrate, search_latency, warn_of_missed
from graphprune.slimming.preflight import check_use, refuse_nan
from graphprune.transformers_config.pretrained import fit_own_config
from graphprune.utils.safetensors_blocks import Checkpoint, CheckpointWeights
from graphprune.utils.tensors import named_tensors
from graphprune.verify import copy_with_slots_zeroed

Groups: TypeAlias = tuple[tuple[str, int, bool, bool], ...]

MILLI = 1e-6  # milliseconds in a nanosecond

_HALF = 0.5  # what goes where no ratio is given


class Options(TypedDict, total=False):
    """The keyword arguments of `slim`, which says what they mean."""

    of: Unit
    importance: Importance
    ranking: Ranking
    steps: int
    align: Align
    include: Sequence[Pattern]
    exclude: Sequence[Pattern]
    renormalised: bool
    plan: Plan | None
    form: Form
    verify: bool
    seed: int
    data: Any
    loss: Loss | None
    compensate: bool | Method
    latency_ms: float | None
    provider: str
    threads: int
    weights: str | Path | None


@dataclass(frozen=True)
class Order:
    """What is asked of `slim`: the request, and the other options.

    Attributes:
        way: the part of the way that is gone with this cut; below 1 others follow, and `latency_ms` is
            what the last is to reach.

    """

    request: Request
    importance: Importance = "l2"
    plan: Plan | None = None
    form: Form = "auto"
    verify: bool = True
    seed: int = 0
    data: Any = None
    loss: Loss | None = None
    compensate: bool | Method = False
    latency_ms: float | None = None
    provider: str = "cpu"
    threads: int = 1
    weights: str | Path | None = None
    way: float = 1.0

    @classmethod
    def of(cls, ratio: float | None, options: Options) -> Order:
        """Return the order for a ratio (None where none was given) and options.

        Warns of options that nothing will read.

        Raises:
            TypeError: there is no such option.
            InvalidRequestError: an option makes no sense.

        """
        unknown = sorted(options.keys() - Options.__annotations__)
        if unknown:
            raise TypeError(f"there is no option {unknown[0]!r}; see graphprune.slim")
        order_options: dict[str, Any] = dict(options)
        if order_options.get("latency_ms") is not None:
            order_options["of"] = _check_latency(
                order_options["latency_ms"], order_options.get("of", "channels")
            )
        defaults = {f.name: f.default for f in (*fields(Request), *fields(cls))}
        check_use(ratio, options, defaults)
        # taken out, so that what is left are the fields of the order itself
        request_options = {
            f.name: order_options.pop(f.name) for f in fields(Request) if f.name in order_options
        }
        return cls(Request(_HALF if ratio is None else ratio, **request_options), **order_options)


def slim(
    model: Any,
    ratio: float | None = None,
    example_inputs: Any = None,
    *,
    of: Unit = "channels",
    importance: Importance = "l2",
    ranking: Ranking = "auto",
    steps: int = 1,
    align: Align = "auto",
    include: Sequence[Pattern] = (),
    exclude: Sequence[Pattern] = (),
    renormalised: bool = False,
    plan: Plan | None = None,
    form: Form = "auto",
    verify: bool = True,
    seed: int = 0,
    data: Any = None,
    loss: Loss | None = None,
    compensate: bool | Method = False,
    latency_ms: float | None = None,
    provider: str = "cpu",
    threads: int = 1,
    weights: str | Path | None = None,
) -> Any:
    """Return a smaller copy of a model, checked against the original; the original is not changed.

    Args:
        model: an nn.Module, fx.GraphModule or torch.export.ExportedProgram.
        ratio: fraction to remove, 0 <= ratio < 1, counted in what `of` names; half if not given.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments or
            `graphprune.Inputs`; may be left out for image, vector, sequence and token models.
        of: "channels" of the groups that may be cut, "parameters" or "macs" of the whole model, or its
            "latency", measured in ONNX Runtime on the example inputs: the model is exported and measured
            node by node, at this and at smaller widths, and the result is measured and corrected.
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
            (multiples of 16; of 8 in groups under 64, of 4 under 16), or a number; 1 for any.
        include: cut only groups whose name, or the name of a member parameter or of its module, fits
            one of these globs; a module stands for all parameters in it.
        exclude: do not cut such groups. Channels go from all members of a group or from none, so a
            group stays that has one member among others.
        renormalised: also cut channels along which a norm, mean or softmax runs; the slim model then
            differs from the silenced original by that statistic, and a warning names the groups.
        plan: cut exactly this instead of choosing.
        form: "module" keeps the model's class and code, and lets sizes that its modules hold follow;
            "graph" gives an fx.GraphModule whose sizes are rewritten; "auto" prefers the first where it
            works.
        verify: compare with the original, removed channels silenced, in float64 (where it computes in
            that), on the example inputs and on longer, shorter and more of them; without it, the
            slim model is only seen to run.
        seed: for importance "random".
        data: batches, a few hundred samples in all: a list, a DataLoader or another iterable of the
            model's inputs or of pairs of inputs and target; several inputs of a model are
            `graphprune.Inputs(a, b)`. In a process group of torch.distributed
            each process looks at its share of them and all come to the same plan and the same slim
            model; all have to make the call.
        loss: from the model's output and a batch's target to one number, as F.cross_entropy is: taken
            to be a mean over samples, so that a batch of few counts for less, unless it is seen to be
            a sum.
        compensate: change the weights that stay so that each layer gives what it gave before, on
            `data` (whose targets are not used): True or "least_squares" for weights and biases,
            "constants" for biases alone. The slim model is verified before that.
        latency_ms: the latency that the slim model is to have, in milliseconds, instead of a ratio.
        provider: where latency is measured: "cpu", "cuda", "cuda-tf32", "cuda-float16", or the name of
            another provider of ONNX Runtime.
        threads: threads inside an operator, on the CPU.
        weights: for a model on the meta device, the safetensors file or the folder of several with an
            index that holds its values. Criteria that look at weights alone read them there, a block at
            a time, in one step; `shrink_checkpoint` carries out the plan.

    Returns:
        An nn.Module; for an ExportedProgram, an ExportedProgram.

    Raises:
        InvalidRequestError: an argument makes no sense.
        CaptureError: the model does not run on the inputs, or cannot be traced where that is needed.
        VerificationError: the slim model is not what it should be; none is returned.
        ExportError: its latency cannot be measured.
        DistributedError: another process of the group failed, or did something else.

    """
    result = slimmed(
        model, ratio, example_inputs, of=of, importance=importance, ranking=ranking, steps=steps,
        align=align, include=include, exclude=exclude, renormalised=renormalised, plan=plan,
        form=form, verify=verify, seed=seed, data=data, loss=loss, compensate=compensate,
        latency_ms=latency_ms, provider=provider, threads=threads, weights=weights,
    )  # fmt: skip
    if isinstance(model, ExportedProgram):
        return reexport(model, result.model, example_inputs)
    return result.model


def _check_latency(milliseconds: float, of: str) -> str:
    """Return the unit that `latency_ms` stands for, once both make sense."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, Real) or milliseconds <= 0:
        raise InvalidRequestError(f"latency_ms={milliseconds!r} must be a number above 0")
    if of not in ("channels", "latency"):
        raise InvalidRequestError(
            f"latency_ms= asks for a latency and of={of!r} for something else"
        )
    return "latency"


def slimmed(
    model: Any, ratio: float | None = None, example_inputs: Any = None, **options: Unpack[Options]
) -> Slimmed:
    """Return what `slim` returns together with its plan, graph, form, verification and repair.

    Takes the arguments of `slim`.
    """
    return run_slim(Order.of(ratio, options), model, example_inputs)


@torch.inference_mode(False)
def run_slim(
    order: Order, model: Any, example_inputs: Any, baseline: Baseline | None = None
) -> Slimmed:
    """Return the slim model that was ordered; `baseline` is the model before any cut, if cut before."""
    with join_call(order.data is not None):
        return _carry_out(order, model, example_inputs, baseline)


def _carry_out(order: Order, model: Any, example_inputs: Any, baseline: Baseline | None) -> Slimmed:
    if order.form not in ("auto", "module", "graph"):
        raise InvalidRequestError(f"form={order.form!r} must be 'auto', 'module' or 'graph'")
    method = method_of(order.compensate)
    runtime = Runtime.of(order.provider, order.threads)
    module, inputs = normalize_model_and_inputs(model, example_inputs)
    refuse_nan(module, inputs)
    order = replace(order, request=order.request.with_names(module))
    has_data = not any(tensor.is_meta for tensor in named_tensors(module).values())
    batches = None if order.data is None else batches_of(order.data)
    weights = None if order.weights is None else weights_for(order, module)
    if weights is not None:
        # but those of index buffers come from the files: inference reads the orders in them
        module = weights.without_values(module)
    choice = PlanCache(order, module, batches, baseline, weights)
    job = Job(module, inputs, choice.plan_for, order.verify and has_data)
    if order.plan is None and order.request.of == "latency":
        result = towards_latency(order, job, choice, runtime)
    else:
        result = in_form(order.form, job)
    result = fit_own_config(result)
    result = replace(result, scores=choice.scores.get(groups_of(result.graph)))
    if batches is not None:
        # before the repair, which sums over the processes and would mix up different slim models
        batches.ranks.agree("arrived at another plan", result.plan.digest)
    if method is None:
        return result
    repair = compensate_model(module, result.model, result.plan, inputs, batches, method)
    return replace(result, compensation=repair)


class PlanCache:
    """What is chosen for the graphs of one model; scores are asked for once."""

    def __init__(
        self,
        order: Order,
        module: nn.Module,
        batches: Share | None,
        baseline: Baseline | None,
        weights: CheckpointWeights | None,
    ) -> None:
        self.order = order
        self.module = module
        self.batches = batches
        self.whole = baseline
        self.weights = weights
        self.scores: dict[Groups, Scores] = {}
        self.plans: dict[Groups, Plan] = {}

    def plan_for(self, graph: DependencyGraph) -> Plan:
        """Return what the order asks for; a second form that is tried has the plan of the first."""
        groups = groups_of(graph)
        if groups not in self.plans:
            self.plans[groups] = self.choose_plan(graph, self.order.request, self.whole)
        return self.plans[groups]

    def choose_plan(
        self,
        graph: DependencyGraph,
        request: Request,
        baseline: Baseline | None,
        cost: Amount | None = None,
    ) -> Plan:
        """Return the plan that a request asks for."""
        if self.order.plan is not None:
            return self.order.plan
        losses = are_losses(self.order.importance)

        def scores_without(plan_so_far: Plan | None) -> Scores:
            return self._scores(graph, plan_so_far)

        return choose(
            graph,
            scores_without,
            request,
            losses=losses,
            baseline=baseline,
            cost=cost,
            final=self.order.way == 1,
        )

    def _scores(self, graph: DependencyGraph, plan_so_far: Plan | None) -> Scores:
        if plan_so_far is not None:
            return self._compute_scores(
                graph,
                copy_with_slots_zeroed(self.module, graph.inference, plan_so_far.masks(graph)),
            )
        groups = groups_of(graph)
        if groups not in self.scores:
            self.scores[groups] = self._compute_scores(graph, self.module)
        return self.scores[groups]

    def _compute_scores(self, graph: DependencyGraph, model: nn.Module) -> Scores:
        order = self.order
        subject = ScoringContext(model, graph, self.batches, order.loss, order.seed, self.weights)
        return scores(subject, order.importance)


def weights_for(order: Order, module: nn.Module) -> CheckpointWeights:
    """Return where the values of a model without any are.

    Raises:
        InvalidRequestError: the model has values, or something was asked for that runs it on them.

    """
    if not any(tensor.is_meta for tensor in named_tensors(module).values()):
        raise InvalidRequestError(
            f"weights={str(order.weights)!r} is for a model on the meta device, and this "
            f"{type(module).__name__} holds values of its own; build it under torch.device('meta')"
        )
    by_weights = order.importance in BY_WEIGHTS and order.request.steps == 1
    if order.plan is None and not by_weights:
        raise InvalidRequestError(
            f"importance={order.importance!r} with steps={order.request.steps} cannot be computed from "
            f"files; with weights= choose from {', '.join(BY_WEIGHTS)}, in one step, or load the model"
        )
    if order.data is not None or order.compensate or order.request.of == "latency":
        raise InvalidRequestError(
            "data, compensate and latency need a model that runs, and weights= is for one without values; "
            "load the model, or leave them out"
        )
    weights = CheckpointWeights.of(Checkpoint.of(order.weights or ""), module)
    weights.check_shapes(module)
    return weights


def groups_of(graph: DependencyGraph) -> Groups:
    """Return what two graphs of one model have in common where the same can be cut."""
    return tuple((g.name, g.size, g.exact, g.inner) for g in graph.groups)


def target_of(order: Order, original: float) -> float:
    """Return the latency that is asked for, in milliseconds, as the original's is."""
    if order.latency_ms is None:
        return original * (1 - order.request.ratio)
    return original + order.way * (order.latency_ms - original)


def towards_latency(order: Order, job: Job, choice: PlanCache, runtime: Runtime) -> Slimmed:
    """Return the slim model whose measured latency is nearest to what was asked for."""
    request = order.request
    unverified_job = replace(job, check=False)

    def slim_to_width(width: float) -> Slimmed:
        uniform_request = replace(
            request, of="channels", ranking="uniform", ratio=1 - width, steps=1
        )

        def plan_for(graph: DependencyGraph) -> Plan:
            # which channels go is all the same for the time; of equal scores the first stay
            equal_scores = {group.name: np.zeros(group.size) for group in graph.groups}
            return choose(graph, lambda _: equal_scores, uniform_request)

        return in_form(order.form, replace(unverified_job, plan_for=plan_for))

    with Bench(job.module, job.inputs, runtime) as bench:

        def make_planner(latency: LatencyModel) -> Callable[[DependencyGraph], Plan]:
            def plan_for(graph: DependencyGraph) -> Plan:
                # `target` is set below, in milliseconds; the total of a baseline is in nanoseconds
                baseline = choice.whole or Baseline.of(graph, request, bench.seconds * NANO)
                latency_request = replace(
                    request, ratio=max(1 - target / MILLI / baseline.total, 0.0)
                )
                return choice.choose_plan(
                    graph, latency_request, baseline, bench.of_groups(latency, graph)
                )

            return plan_for

        def attempt(latency: LatencyModel) -> Slimmed:
            return in_form(order.form, replace(unverified_job, plan_for=make_planner(latency)))

        original_nanoseconds = bench.seconds * NANO if choice.whole is None else choice.whole.total
        target = target_of(order, original_nanoseconds * MILLI)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphPruneWarning)  # what holds in the end is said then
            latency = calibrate(bench, slim_to_width)
            latency, reached = search_latency(bench, latency, attempt, target)
        # once more by the best latency model, this time verified and with the warnings of the choice
        result = in_form(order.form, replace(job, plan_for=make_planner(latency)))
    if order.way == 1:
        warn_of_missed(reached, request)
    return replace(result, latency=reached)
