"""Which form of a sparse layer runs fastest in ONNX Runtime: small models of each, timed in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from graphprune.errors import listed, warn
from graphprune.onnx_export.export import Feed
from graphprune.onnx_export.providers import Runtime
from graphprune.runtime.timing import time_onnx

OPSET = 18
IR_VERSION = 9

_SECONDS = 0.4


def benchmark_variants(
    models: Mapping[str, onnx.ModelProto], feed: Feed, runtime: Runtime
) -> dict[str, float]:
    """Return the seconds that each model takes."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in models}
        for name, path in files.items():
            onnx.save(models[name], path)
        feeds = dict.fromkeys(files, feed)
        times = time_onnx(files, feeds, runtimes=[runtime], seconds=_SECONDS)[str(runtime)]
    return {name: latency.steadiest.median for name, latency in times.items()}


def warn_of_slow(kind: str, layers: Sequence[str], runtime: Runtime, advice: str = "") -> None:
    """Warn of sparse layers, in words, that are fastest as they are."""
    if layers:
        warn(f"sparse {kind} that run no faster on {runtime} stay dense: {listed(layers)}{advice}")


def warn_of_isolated_zeros(kind: str, layers: Sequence[str]) -> None:
    """Warn of layers whose zeros are in no blocks."""
    if layers:
        warn(
            f"the zeros of {kind} stand alone, in no blocks of several rows, so they gain no time: "
            f"{listed(layers)}; export(..., sparse_weights=True) makes the file smaller, and "
            "blocks, as of SparseRecurrent or GradualSparsity(block=(32, 32), balanced=True), the time"
        )
