"""What was found out about a model and its slimmer version: as a table, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from graphprune.runtime.timing import Latency, Spread
from graphprune.utils.atomic_files import check_target_path, write_text
from graphprune.utils.html import render_template

SUFFIXES = (".json", ".html")


@dataclasses.dataclass(frozen=True)
class File:
    """The ONNX file of a model.

    Attributes:
        bytes: of the file.
        opset: version of the operators.
        batch_free: whether it takes any batch size.
        checked: the batch sizes at which it was compared with PyTorch.
        difference: the largest that was found, relative to the largest value of the output.
        memory: bytes by which a process grows to load and run it on the CPU, or None if not known.

    """

    bytes: int
    opset: int
    batch_free: bool
    checked: tuple[int, ...]
    difference: float
    memory: int | None


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """A node as ONNX Runtime runs it, and where it stands in the model.

    Attributes:
        node: of the traced graph, the last of those that are run together.
        module: the path of the module that it is called in.
        operator: of ONNX Runtime.
        seconds: a run.

    """

    node: str
    module: str
    operator: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class ModelMeasurement:
    """What was found out about one model.

    Attributes:
        parameters: their number.
        macs: multiply-adds on the example inputs.
        file: the ONNX file, or None where the model could not be exported.
        latency: by where it ran: "cpu", "cuda-float16", "torch", "torch.compile"; with ", batch 8" behind
            it for other batch sizes than the example's.
        places: where the time goes, on the first of the runtimes.
        reason: why there is no file.

    """

    parameters: int
    macs: int
    file: File | None
    latency: dict[str, Latency]
    places: tuple[NodeTime, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model and its slimmer version, measured alike. Prints as a table."""

    original: ModelMeasurement
    slim: ModelMeasurement
    inputs: str
    threads: int
    versions: dict[str, str]
    machine: dict[str, str]
    notes: tuple[str, ...] = ()

    def speedups(self) -> dict[str, float]:
        """Return how many times faster the slim model is, by where they ran: a ratio of medians."""
        before, after = self.original.latency, self.slim.latency
        shared = [provider for provider in before if provider in after]
        return {p: before[p].steadiest.median / after[p].steadiest.median for p in shared}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, numbers and strings."""
        return {**dataclasses.asdict(self), "speedups": self.speedups()}

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, or as a page to look at, with where the time went.

        `Slimmed.report(comparison=)` writes a page that also says what was asked and done.

        Args:
            path: ending in .json or .html.

        Raises:
            InvalidRequestError: it ends otherwise, or is in no folder.

        """
        path = check_target_path(path, *SUFFIXES)
        text = self.to_json() if path.suffix == ".json" else page(self)
        write_text(path, text)

    def __str__(self) -> str:
        sink = io.StringIO()
        console = Console(file=sink, width=100, color_system=None, markup=False, emoji=False)
        console.print(_table(self))
        return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def _table(comparison: Comparison) -> Table:
    """Return the comparison as a table: a row a quantity, a column a model."""
    headings = ("original", "slim", "slim / original")
    table = Table(
        Column(""),
        *(Column(heading, justify="right") for heading in headings),
        title=f"inputs {comparison.inputs}",
        caption="\n".join(notes(comparison)),
        caption_justify="left",
    )
    for row in rows(comparison.original, comparison.slim):
        table.add_row(*row)
    return table


def rows(before: ModelMeasurement, after: ModelMeasurement) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: a quantity, both models' and their ratio."""
    files = before.file, after.file
    yield _row("parameters", before.parameters, after.parameters)
    yield _row("multiply-adds", before.macs, after.macs)
    yield _row("bytes of ONNX", *(file.bytes if file else None for file in files))
    cells = [f"{file.difference:.1e}" if file else "not exported" for file in files]
    yield "ONNX against PyTorch", *cells, ""
    if any(file and file.memory is not None for file in files):
        yield _row(
            "bytes of memory, cpu",
            *(file.memory if file else None for file in files),
            without=["not measured" if file else "not exported" for file in files],
        )
    for provider in before.latency | after.latency:
        yield _latency_row(provider, before.latency.get(provider), after.latency.get(provider))


def _row(
    label: str, *counts: int | None, without: Sequence[str] = ("not exported", "not exported")
) -> tuple[str, ...]:
    """Return a row of two counts and their ratio, with words where there is no count."""
    cells = [
        word if count is None else f"{count:,}" for count, word in zip(counts, without, strict=True)
    ]
    return label, *cells, _ratio(*counts)


def _latency_row(provider: str, *latencies: Latency | None) -> tuple[str, ...]:
    """Return a row of two medians with their quartiles, in milliseconds, and the medians' ratio."""
    spreads = [latency.steadiest if latency else None for latency in latencies]
    return (
        f"{provider} latency",
        *map(_milliseconds, spreads),
        _ratio(*(s.median if s else None for s in spreads)),
    )


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return "not exported"
    low, median, high = (f"{s * 1e3:.3g}" for s in (spread.low, spread.median, spread.high))
    return f"{median} ms ({low} to {high})"


def _ratio(before: float | None, after: float | None) -> str:
    return f"{after / before:.3f}" if before and after is not None else ""


def notes(comparison: Comparison) -> Iterator[str]:
    """Yield what the table's numbers rest on."""
    yield from comparison.notes
    sides = {"original": comparison.original, "slim": comparison.slim}
    for name, side in sides.items():
        if side.reason:
            yield f"{name} is not exported: {side.reason}"
        if side.file and not side.file.batch_free:
            yield f"{name} is exported for this batch size only"
        if side.file:
            batches = " and ".join(map(str, side.file.checked))
            yield f"{name} is compared with PyTorch at batch {batches}"
    opsets = sorted({side.file.opset for side in sides.values() if side.file})
    if opsets:
        yield f"ONNX opset {', '.join(map(str, opsets))}"
    yield "Latency: median and quartiles; for one thread on the CPU, of processor time."
    yield ", ".join([*comparison.machine.values(), f"threads: {comparison.threads}"])
    yield ", ".join(f"{name} {number}" for name, number in comparison.versions.items())


def page(comparison: Comparison) -> str:
    """Return the comparison as one page of HTML that needs nothing else."""
    return render_template("comparison.html", **template_values(comparison))


def template_values(comparison: Comparison) -> dict[str, Any]:
    """Return what the pages that show a comparison ask for."""
    before, after = comparison.original, comparison.slim
    latencies = [
        (where, before.latency[where].steadiest, after.latency[where].steadiest)
        for where in before.latency
        if where in after.latency
    ]
    return {
        "comparison": comparison,
        "rows": list(rows(before, after)),
        "notes": list(notes(comparison)),
        "latencies": latencies,
        "places": list(pair_node_times(before.places, after.places)),
        "operators": sum_by_operator(before.places, after.places),
    }


def pair_node_times(
    before: tuple[NodeTime, ...], after: tuple[NodeTime, ...]
) -> Iterator[tuple[NodeTime, float, float]]:
    """Yield the places of both models in order, with the seconds of each; 0 where one has no such node."""
    before_by_node, after_by_node = (
        {node_time.node: node_time for node_time in side} for side in (before, after)
    )
    # In the original's order; what only the slim model has comes after it.
    for node, node_time in {**before_by_node, **after_by_node}.items():
        seconds = [
            side[node].seconds if node in side else 0.0 for side in (before_by_node, after_by_node)
        ]
        yield before_by_node.get(node, node_time), seconds[0], seconds[1]


def sum_by_operator(
    before: tuple[NodeTime, ...], after: tuple[NodeTime, ...]
) -> dict[str, tuple[float, float]]:
    """Return the seconds of all nodes of an operator, before and after, the longest first."""
    seconds_by_operator: dict[str, list[float]] = {}
    for side, places in enumerate((before, after)):
        for node_time in places:
            seconds_by_operator.setdefault(node_time.operator, [0.0, 0.0])[side] += (
                node_time.seconds
            )
    ordered = sorted(seconds_by_operator.items(), key=lambda item: -item[1][0])
    return {operator: (seconds[0], seconds[1]) for operator, seconds in ordered}
