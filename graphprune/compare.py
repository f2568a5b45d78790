"""Two models side by side: size, work, the ONNX file's bytes, latency, agreement with PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from graphprune.cost import count_macs, count_parameters
from graphprune.errors import ExportError, GraphPruneWarning
from graphprune.inputs import Inputs
from graphprune.onnx import Exported, Model, as_module, export
from graphprune.runtimes import CUDA, Runtime, default_runtimes, machine
from graphprune.timing import Latency, Spread, time_onnx


@dataclasses.dataclass(frozen=True)
class File:
    """The ONNX file of a model; `difference` is relative, between PyTorch and ONNX Runtime."""

    bytes: int
    opset: int
    batch_free: bool
    difference: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out about one model.

    `macs` are multiply-adds on the example inputs; `latency` is by provider, on those inputs too.
    Where the model could not be exported, `reason` says why, and there is no file and no latency.
    """

    parameters: int
    macs: int
    file: File | None
    latency: dict[str, Latency]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model and its slimmer version, measured alike. Prints as a table."""

    original: Measured
    slim: Measured
    inputs: str
    threads: int
    versions: dict[str, str]
    machine: dict[str, str]

    def speedups(self) -> dict[str, float]:
        """Return how many times faster the slim model is, by provider: a ratio of medians."""
        before, after = self.original.latency, self.slim.latency
        shared = [provider for provider in before if provider in after]
        return {p: before[p].steadiest.median / after[p].steadiest.median for p in shared}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, numbers and strings."""
        return {**dataclasses.asdict(self), "speedups": self.speedups()}

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        sink = io.StringIO()
        console = Console(file=sink, width=100, color_system=None, markup=False, emoji=False)
        console.print(_table(self))
        return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def compare(
    model: Model,
    slimmer: Model,
    example_inputs: Any,
    *,
    providers: Sequence[str] | None = None,
    threads: int = 1,
    seconds: float = 3.0,
    path: str | Path | None = None,
) -> Comparison:
    """Measure a model and its slimmer version, as ONNX files in ONNX Runtime.

    A model that cannot be exported is reported as such, with the reason.

    Args:
        model: the original.
        slimmer: what became of it.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or `Inputs`.
        providers: where to time them: "cpu", "cuda", "cuda-tf32", "cuda-float16", or the name of another
            provider of ONNX Runtime; by default the CPU and each accelerator that is here.
        threads: threads inside an operator, on the CPU.
        seconds: time for the latency of each model on each of them.
        path: a folder to keep original.onnx and slim.onnx in; by default they are thrown away.

    Raises:
        InvalidRequestError: ONNX Runtime does not have one of the providers.

    """
    inputs = Inputs.of(example_inputs)
    runtimes = (
        default_runtimes(threads)
        if providers is None
        else [Runtime.of(name, threads) for name in providers]
    )
    models = {"original": as_module(model), "slim": as_module(slimmer)}
    with _folder(path) as folder:
        tried = {name: _export(m, inputs, folder / f"{name}.onnx") for name, m in models.items()}
        files = {name: e for name, e in tried.items() if isinstance(e, Exported)}
        timed = time_onnx(
            {name: exported.path for name, exported in files.items()},
            {name: exported.feed(inputs) for name, exported in files.items()},
            runtimes=runtimes,
            seconds=seconds,
        )
    return Comparison(
        **{name: _measured(m, inputs, tried[name], timed, name) for name, m in models.items()},
        inputs=repr(inputs).removeprefix("Inputs"),
        threads=threads,
        versions={name: version(name) for name in ("graphprune", "torch", "onnxruntime")},
        machine=machine(
            on_gpu=torch.cuda.is_available() and any(r.provider == CUDA for r in runtimes)
        ),
    )


def _export(model: nn.Module, inputs: Inputs, path: Path) -> Exported | ExportError:
    """Return the exported file, or the reason that there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphPruneWarning)  # a note under the table says it
        try:
            return export(model, inputs, path)
        except ExportError as error:
            return error


@contextlib.contextmanager
def _folder(path: str | Path | None) -> Iterator[Path]:
    """Give a folder to write in: the caller's, or one that is removed afterwards."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _measured(
    model: nn.Module,
    inputs: Inputs,
    exported: Exported | ExportError,
    timed: dict[str, dict[str, Latency]],
    name: str,
) -> Measured:
    """Return what was found out about one model."""
    sizes = count_parameters(model), count_macs(model, inputs)
    if isinstance(exported, ExportError):
        return Measured(*sizes, None, {}, str(exported))
    file = File(exported.bytes, exported.opset, exported.batch_free, exported.difference)
    return Measured(*sizes, file, {provider: by[name] for provider, by in timed.items()})


def _table(comparison: Comparison) -> Table:
    """Return the comparison as a table: a row a quantity, a column a model."""
    headings = ("original", "slim", "slim / original")
    table = Table(
        Column(""),
        *(Column(heading, justify="right") for heading in headings),
        title=f"inputs {comparison.inputs}",
        caption="\n".join(_notes(comparison)),
        caption_justify="left",
    )
    for row in _rows(comparison.original, comparison.slim):
        table.add_row(*row)
    return table


def _rows(before: Measured, after: Measured) -> Iterator[tuple[str, ...]]:
    files = before.file, after.file
    yield _row("parameters", before.parameters, after.parameters)
    yield _row("multiply-adds", before.macs, after.macs)
    yield _row("bytes of ONNX", *(file.bytes if file else None for file in files))
    cells = [f"{file.difference:.1e}" if file else "not exported" for file in files]
    yield "ONNX against PyTorch", *cells, ""
    for provider in before.latency | after.latency:
        yield _latency_row(provider, before.latency.get(provider), after.latency.get(provider))


def _row(label: str, *counts: int | None) -> tuple[str, ...]:
    """Return a row of two counts and their ratio."""
    cells = ["not exported" if count is None else f"{count:,}" for count in counts]
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


def _notes(comparison: Comparison) -> Iterator[str]:
    """Yield what the table's numbers rest on."""
    sides = {"original": comparison.original, "slim": comparison.slim}
    for name, side in sides.items():
        if side.reason:
            yield f"{name} is not exported: {side.reason}"
        if side.file and not side.file.batch_free:
            yield f"{name} is exported for this batch size only"
    yield "Latency: median and quartiles; for one thread on the CPU, of processor time."
    yield ", ".join([*comparison.machine.values(), f"threads: {comparison.threads}"])
    yield ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
