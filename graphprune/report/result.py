"""What `slimmed` returns: the slim model, how it came about, and a page about both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.compensation import Compensation
from graphprune.groups.cost import mac_cost, parameter_cost
from graphprune.groups.groups import Scores
from graphprune.inspection import build_document, read_scripts, render_page
from graphprune.inspection.dependency_graph import DependencyGraph
from graphprune.layout import size_of
from graphprune.masks import kept_size
from graphprune.report.comparison import Comparison, template_values
from graphprune.runtime.latency import LatencyOutcome
from graphprune.selection.plan import Plan
from graphprune.shrink.ties import AmbiguousSize
from graphprune.utils.atomic_files import check_target_path, write_text
from graphprune.utils.html import render_template
from graphprune.utils.inputs import Inputs
from graphprune.verify import Verification


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
        latency: for `of="latency"`, what was asked for and what was measured; else None.
        scores: by group, the importance of each channel of the original; None for a plan as given.
        ambiguous_sizes: numbers that the modules hold and that equal several sizes which differ now, so
            that they were left as they were.

    """

    model: nn.Module
    plan: Plan
    graph: DependencyGraph
    inputs: Inputs
    form: str
    why_graph: str
    verification: Verification | None
    compensation: Compensation | None = None
    latency: LatencyOutcome | None = None
    scores: Scores | None = None
    ambiguous_sizes: tuple[AmbiguousSize, ...] = ()

    def report(
        self, path: str | Path, *, title: str = "", comparison: Comparison | None = None
    ) -> None:
        """Write a page: what was asked and done, verification, sizes before and after, graph and plan.

        Args:
            path: ends in .html.
            title: what to call the model; the name of its class by default.
            comparison: of `graphprune.compare`; then latency, files and where the time went are on the
                page, and in the graph what each module took.

        Raises:
            InvalidRequestError: the path ends otherwise.

        """
        _save_report(self, path, title, comparison)


def _save_report(
    result: Slimmed, path: str | Path, title: str, comparison: Comparison | None
) -> None:
    path = check_target_path(path, ".html")
    title = title or type(result.model).__name__
    inference, kept = result.graph.inference, _count_kept(result)
    seconds = None if comparison is None else _seconds(comparison)
    contents = build_document(result.graph, title, result.scores, result.plan, seconds)
    costs = {"parameters": parameter_cost(inference), "multiply-adds": mac_cost(inference)}
    tensors = [
        (name, layouts)
        for name, layouts in inference.parameters.items()
        if name in inference.trainable
    ]
    counts = [
        (
            name,
            f"{_shape(map(size_of, layouts))} to {_shape(kept_size(x, kept) for x in layouts)}",
            prod(map(size_of, layouts)),
            prod(kept_size(x, kept) for x in layouts),
        )
        for name, layouts in tensors
    ]
    text = render_template(
        "report.html",
        read_scripts(),  # of the graph in it
        **({"comparison": None} if comparison is None else template_values(comparison)),
        title=title,
        facts=list(_facts(result)),
        sizes=[(name, cost.total(), cost.total(kept)) for name, cost in costs.items()],
        groups=[
            (group.name, group.size, kept.get(group.axis, group.size))
            for group in result.graph.groups
        ],
        tensors=counts,
        most=max((before for *_, before, _ in counts), default=1),
        repaired=result.compensation.layers if result.compensation else (),
        graph=render_page(contents),
        plan=result.plan.to_json(),
    )  # fmt: skip
    write_text(path, text)


def _count_kept(result: Slimmed) -> dict[Any, int]:
    """Return by axis how many channels are left."""
    return {
        result.graph.by_name[name].axis: len(channels)
        for name, channels in result.plan.keep.items()
    }


def _seconds(comparison: Comparison) -> dict[str, list[float]]:
    """Return by module what its operators took, before and after."""
    seconds_by_module: dict[str, list[float]] = {}
    for side, measured in enumerate((comparison.original, comparison.slim)):
        for node_time in measured.places:
            seconds_by_module.setdefault(node_time.module, [0.0, 0.0])[side] += node_time.seconds
    return seconds_by_module


def _shape(sizes: Any) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _facts(result: Slimmed) -> Iterator[tuple[str, str]]:
    """Yield what was asked and done, in words."""
    requested = ", ".join(f"{name}={value!r}" for name, value in result.plan.request.items())
    yield "asked", requested or "a plan, as given"
    yield "example inputs", str(result.inputs)
    total = sum(result.plan.sizes.values())
    yield "removed", f"{result.plan.removed:,} of {total:,} channels that could be cut"
    why = f" ({result.why_graph})" if result.why_graph else ""
    yield "form", f"{result.form}{why}"
    verification = result.verification
    yield (
        "verified",
        "not" if verification is None
        else f"{verification.outputs} outputs equal the original's with the removed channels silenced, to "
        f"{verification.difference:.1e} of the largest value, in "
        f"{str(verification.dtype).removeprefix('torch.')}, on "
        + ", ".join(map(str, verification.inputs)),
    )  # fmt: skip
    if result.latency is not None:
        yield "latency", str(result.latency)
    if result.ambiguous_sizes:
        yield "sizes in attributes left", "; ".join(map(str, result.ambiguous_sizes))
    if result.graph.unknown:
        yield "operators without a rule", ", ".join(map(str, result.graph.unknown))
    yield "versions", f"graphprune {version('graphprune')}, torch {torch.__version__}"
