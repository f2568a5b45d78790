"""Where the time goes in ONNX Runtime: seconds for each node that it runs, and what it came from."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphprune.onnx_export.export import Feed
from graphprune.onnx_export.providers import Runtime, convert_precision, open_session

LEAST_RUNS, MOST_RUNS = 10, 300

_KERNEL = "_kernel_time"
_LEAST = 1e-7  # seconds; less than a microsecond is recorded as nothing
_WAITS = "CUDA_LAUNCH_BLOCKING"


@dataclass(frozen=True)
class Event:
    """A node as ONNX Runtime runs it, after fusion.

    Attributes:
        operator: its name, as in "Conv".
        source: the node or value of the file that it ends with, or "" where none is known.
        seconds: a run, the mean of the middle half of the runs.

    """

    operator: str
    source: str
    seconds: float


def profile_nodes(path: Path, feed: Feed, runtime: Runtime, seconds: float = 2.0) -> list[Event]:
    """Return what ONNX Runtime spends on each of the nodes that it makes of a file, in order.

    On a GPU, calls return before the work is done; there the file is profiled by another process in
    which CUDA waits for each.

    Args:
        path: an ONNX file.
        feed: arrays for its inputs.
        runtime: where to run it.
        seconds: to run for; at least 10 runs are made, and 300 at most.

    """
    if runtime.device != "cpu" and os.environ.get(_WAITS) != "1":
        return _profile_in_subprocess(path, feed, runtime, seconds)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = open_session(
            convert_precision(path, runtime.precision),
            runtime,
            enable_profiling=True,
            profile_file_prefix=str(Path(folder) / "profile"),
            optimized_model_filepath=str(optimized),
        )
        session.run(None, feed)
        end = time.perf_counter() + seconds
        runs = 1
        while runs < LEAST_RUNS or (runs < MOST_RUNS and time.perf_counter() < end):
            session.run(None, feed)
            runs += 1
        records = json.loads(Path(session.end_profiling()).read_text())
        file_names = _names(onnx.load(path, load_external_data=False).graph)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    # What runs inside an If or a Loop is recorded too; the outer node, in `nodes`, has its time.
    durations = _durations(records)
    sources = _sources(nodes, file_names)
    return [
        Event(node.op_type, sources[node.name], _average_middle_half(durations[node.name]))
        for node in nodes
        if durations.get(node.name)
    ]


def _profile_in_subprocess(path: Path, feed: Feed, runtime: Runtime, seconds: float) -> list[Event]:
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder) / "order.pickle"
        job_file.write_bytes(pickle.dumps((path, feed, runtime, seconds)))
        completed = subprocess.run(
            [sys.executable, "-m", __name__, str(job_file)],
            env={**os.environ, _WAITS: "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    # What else is printed, by a library perhaps, comes before the last line.
    return [Event(**event) for event in json.loads(completed.stdout.splitlines()[-1])]


def _main() -> None:
    """Profile what a file orders that this process's parent wrote, and print it."""
    path, feed, runtime, seconds = pickle.loads(Path(sys.argv[1]).read_bytes())
    print(json.dumps([asdict(event) for event in profile_nodes(path, feed, runtime, seconds)]))


def _durations(records: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return by node the seconds of each run but the first."""
    samples_by_node = defaultdict(list)
    for record in records:
        if record.get("cat") == "Node" and record["name"].endswith(_KERNEL):
            samples_by_node[record["name"].removesuffix(_KERNEL)].append(record["dur"] * 1e-6)
    return {name: samples[1:] for name, samples in samples_by_node.items()}


def _average_middle_half(samples: Sequence[float]) -> float:
    """Return the mean of the middle half: finer than the microseconds that are recorded, and robust."""
    low, high = len(samples) // 4, len(samples) - len(samples) // 4
    return max(float(np.mean(np.sort(samples)[low:high])), _LEAST)


def _names(graph: onnx.GraphProto) -> set[str]:
    nodes = {node.name for node in graph.node}
    return nodes | {name for node in graph.node for name in node.output}


def _sources(nodes: Sequence[onnx.NodeProto], file_names: set[str]) -> dict[str, str]:
    """Return by fused node the node or value of the file that it ends with.

    A fused node is named after one of those it was made of or after the value that comes out, with
    something behind. One that ONNX Runtime made belongs to the first that reads its result.
    """
    readers: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node.name)
    sources: dict[str, str] = {}
    for node in reversed(nodes):  # each stands before its readers
        direct_matches = (
            _match_longest_prefix(name, file_names) for name in (node.name, *node.output)
        )
        reader_sources = (
            sources.get(reader, "") for name in node.output for reader in readers[name]
        )
        sources[node.name] = next(filter(None, [*direct_matches, *reader_sources]), "")
    return sources


def _match_longest_prefix(name: str, file_names: set[str]) -> str:
    """Return the longest beginning of a name that is a name of the file, or ""."""
    # `conv_3/fused_relu`, then `conv_3/fused`, `conv_3` and `conv`.
    lengths = [len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] in "_/")]
    return next((name[:length] for length in lengths if name[:length] in file_names), "")


if __name__ == "__main__":
    _main()
