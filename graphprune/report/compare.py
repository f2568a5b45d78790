"""Two models side by side: size, work, the ONNX file's bytes, memory, latency, agreement with PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
from torch import fx, nn

from graphprune.errors import ExportError, GraphPruneWarning, in_a_line
from graphprune.groups.cost import count_macs, count_parameters
from graphprune.onnx_export.export import PREFIX, Model, TracedExport, as_module, export_traced
from graphprune.onnx_export.providers import DEFAULT, Runtime, default_runtimes, describe_machine
from graphprune.report.comparison import Comparison, File, ModelMeasurement, NodeTime
from graphprune.runtime.memory import peak_memory
from graphprune.runtime.profiling import profile_nodes
from graphprune.runtime.timing import Latency, time_onnx, time_torch
from graphprune.utils.inputs import Inputs
from graphprune.utils.lru_caches import without_caches
from graphprune.utils.tensors import evaluation_mode


def compare(
    model: Model,
    slimmer: Model,
    example_inputs: Any,
    *,
    providers: Sequence[str] | None = None,
    threads: int = 1,
    batches: Sequence[int] = (),
    in_torch: bool = False,
    seconds: float = 3.0,
    path: str | Path | None = None,
) -> Comparison:
    """Measure a model and its slimmer version, as ONNX files in ONNX Runtime.

    Sizes, agreement with PyTorch, memory, latency, and where the time goes. `print` shows a table, and
    `.save("report.html")` a page. A model that cannot be exported is reported as such, with the reason.

    Args:
        model: the original.
        slimmer: what became of it.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or `Inputs`.
        providers: where to time them: "cpu", "cuda", "cuda-tf32", "cuda-float16", or the name of another
            provider of ONNX Runtime; by default the CPU and each accelerator that is here.
        threads: threads inside an operator, on the CPU.
        batches: times that the example inputs are repeated along the batch, for more latencies.
        in_torch: time both in PyTorch too, eager and compiled, on the CPU.
        seconds: time for the latency of each model on each of them.
        path: a folder to keep original.onnx and slim.onnx in, and float16 versions where those are
            timed; by default they are thrown away.

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
        outcomes = {
            name: _export(module, inputs, folder / f"{name}.onnx")
            for name, module in models.items()
        }
        files = {
            name: outcome for name, outcome in outcomes.items() if isinstance(outcome, TracedExport)
        }
        latency = dict(_latencies(files, inputs, runtimes, batches, seconds))
        # Profiled on the first runtime, on the default one where none is timed.
        sides = {
            name: _measure(module, inputs, outcomes[name], (*runtimes, DEFAULT)[0], seconds)
            for name, module in models.items()
        }
    notes: list[str] = []
    if in_torch:
        latency |= _latencies_in_torch(models, inputs, threads, seconds, notes)
    for name, side in sides.items():
        side.latency.update(
            {where: by_name[name] for where, by_name in latency.items() if name in by_name}
        )
    return Comparison(
        **sides,
        inputs=repr(inputs).removeprefix("Inputs"),
        threads=threads,
        versions={name: version(name) for name in ("graphprune", "torch", "onnx")}
        | {"onnxruntime": onnxruntime.__version__},
        machine=describe_machine(*runtimes),
        notes=tuple(notes),
    )


def _latencies(
    files: Mapping[str, TracedExport],
    inputs: Inputs,
    runtimes: Sequence[Runtime],
    batches: Sequence[int],
    seconds: float,
) -> Iterator[tuple[str, dict[str, Latency]]]:
    """Yield where the files ran, and the latency of each."""
    for times in (1, *(times for times in batches if times != 1)):
        fitting = {n: t for n, t in files.items() if times == 1 or t.exported.batch_free}
        paths = {name: traced.exported.path for name, traced in fitting.items()}
        repeated = inputs.repeat(times)
        feeds = {name: traced.exported.feed(repeated) for name, traced in fitting.items()}
        timed = time_onnx(paths, feeds, runtimes=runtimes, seconds=seconds)
        size = next((t.shape[0] for t in repeated.tensors() if t.dim()), times)
        for where, by_name in timed.items():
            yield where if times == 1 else f"{where}, batch {size}", by_name


def _latencies_in_torch(
    models: Mapping[str, nn.Module], inputs: Inputs, threads: int, seconds: float, notes: list[str]
) -> dict[str, dict[str, Latency]]:
    """Return the latencies in PyTorch; a note says why it could not be compiled."""
    latencies = {}
    with contextlib.ExitStack() as stack:
        for module in models.values():
            stack.enter_context(without_caches(module))
            stack.enter_context(evaluation_mode(module))
        for where, compiled in (("torch", False), ("torch.compile", True)):
            try:
                latencies[where] = time_torch(
                    models, inputs, compiled=compiled, threads=threads, seconds=seconds
                )
            except Exception as error:
                notes.append(f"{where} does not run it here: {in_a_line(error)}")
    return latencies


def _export(model: nn.Module, inputs: Inputs, path: Path) -> TracedExport | ExportError:
    """Return the exported file, or the reason that there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphPruneWarning)  # a note under the table says it
        try:
            return export_traced(model, inputs, path)
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


def _measure(
    model: nn.Module,
    inputs: Inputs,
    traced: TracedExport | ExportError,
    runtime: Runtime,
    seconds: float,
) -> ModelMeasurement:
    """Return what was found out about one model, but for its latency."""
    sizes = count_parameters(model), count_macs(model, inputs)
    if isinstance(traced, ExportError):
        return ModelMeasurement(*sizes, None, {}, reason=str(traced))
    exported = traced.exported
    feed = exported.feed(inputs)
    file = File(
        bytes=exported.bytes,
        opset=exported.opset,
        batch_free=exported.batch_free,
        checked=exported.checked,
        difference=exported.difference,
        memory=peak_memory(exported.path, feed, runtime.threads),
    )
    modules = {node.name: _module_of(node) for node in traced.program.graph.nodes}
    node_times = []
    for event in profile_nodes(exported.path, feed, runtime, seconds / 2):
        node = traced.origins.get(event.source, "")
        node_times.append(NodeTime(node, modules.get(node, ""), event.operator, event.seconds))
    return ModelMeasurement(*sizes, file, {}, _merge_by_node(node_times))


def _module_of(node: fx.Node) -> str:
    """Return the path of the module that a node is called in."""
    # Of each call the path and the class, the innermost last; the path `model.encoder.0` of the traced
    # program is `encoder.0` of the model.
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix(PREFIX.rstrip(".")).removeprefix(".")


def _merge_by_node(node_times: Sequence[NodeTime]) -> tuple[NodeTime, ...]:
    """Return the places, those of one node as one that is named after the longest."""
    times_by_node: dict[str, list[NodeTime]] = {}
    for node_time in node_times:
        times_by_node.setdefault(node_time.node, []).append(node_time)
    longest_by_node = {
        node: max(kernel_times, key=lambda kernel_time: kernel_time.seconds)
        for node, kernel_times in times_by_node.items()
    }
    return tuple(
        dataclasses.replace(
            node_time, seconds=sum(kernel_time.seconds for kernel_time in times_by_node[node])
        )
        for node, node_time in longest_by_node.items()
    )
