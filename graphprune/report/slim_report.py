"""A page about a slimming: what was asked, what was done, what it costs now, and how it was checked."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from graphprune.groups.cost import mac_cost, parameter_cost
from graphprune.inspection import document, page, scripts
from graphprune.layout import size_of
from graphprune.masks import kept_size
from graphprune.report.comparison import Comparison, context
from graphprune.slimming.forms import Slimmed
from graphprune.utils.atomic_files import checked_target, write_text
from graphprune.utils.html import rendered


def save_report(
    result: Slimmed, path: str | Path, title: str = "", comparison: Comparison | None = None
) -> None:
    """Write the page; see `Slimmed.report`.

    Raises:
        InvalidRequestError: the path does not end in .html, or is in no folder.

    """
    path = checked_target(path, ".html")
    title = title or type(result.model).__name__
    inference, kept = result.graph.inference, _kept(result)
    seconds = None if comparison is None else _seconds(comparison)
    found = document(result.graph, title, result.scores, result.plan, seconds)
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
    text = rendered(
        "report.html",
        scripts(),  # of the graph in it
        **({"comparison": None} if comparison is None else context(comparison)),
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
        graph=page(found),
        plan=result.plan.to_json(),
    )  # fmt: skip
    write_text(path, text)


def _kept(result: Slimmed) -> dict[Any, int]:
    """Return by axis how many channels are left."""
    return {
        result.graph.by_name[name].axis: len(channels)
        for name, channels in result.plan.keep.items()
    }


def _seconds(comparison: Comparison) -> dict[str, list[float]]:
    """Return by module what its operators took, before and after."""
    found: dict[str, list[float]] = {}
    for side, measured in enumerate((comparison.original, comparison.slim)):
        for place in measured.places:
            found.setdefault(place.module, [0.0, 0.0])[side] += place.seconds
    return found


def _shape(sizes: Any) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _facts(result: Slimmed) -> Iterator[tuple[str, str]]:
    """Yield what was asked and done, in words."""
    asked = ", ".join(f"{name}={value!r}" for name, value in result.plan.request.items())
    yield "asked", asked or "a plan, as given"
    yield "example inputs", str(result.inputs)
    whole = sum(result.plan.sizes.values())
    yield "removed", f"{result.plan.removed:,} of {whole:,} channels that could be cut"
    why = f" ({result.why_graph})" if result.why_graph else ""
    yield "form", f"{result.form}{why}"
    seen = result.verification
    yield (
        "verified",
        "not" if seen is None
        else f"{seen.outputs} outputs equal the original's with the removed channels silenced, to "
        f"{seen.difference:.1e} of the largest value, in {str(seen.dtype).removeprefix('torch.')}, on "
        + ", ".join(map(str, seen.inputs)),
    )  # fmt: skip
    if result.latency is not None:
        yield "latency", str(result.latency)
    if result.ambiguous_sizes:
        yield "sizes in attributes left", "; ".join(map(str, result.ambiguous_sizes))
    if result.graph.unknown:
        yield "operators without a rule", ", ".join(map(str, result.graph.unknown))
    yield "versions", f"graphprune {version('graphprune')}, torch {torch.__version__}"
