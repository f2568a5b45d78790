"""What sparse connections save in ONNX Runtime: time, memory and bytes against the connections that are on.

    python benchmarks/sparse_layers.py

Chains of three convolutions of 256 channels with a ReLU each, and a VGG-style network, dense and lowered at
densities of 0.25 and 0.125, 32 filters to a block; one CPU thread, in turns. Memory is what a process grows
by at most while it loads a file, and while it loads and runs it, less what it grows by for a ReLU alone.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphprune.passes import LowerSparseConnections, SparseConnections
from latency import header, timed
from torch import nn

import graphprune as gp
from graphprune.onnx_export.providers import Runtime
from graphprune.runtime.memory import peak_memory

RESULTS = Path(__file__).parent / "results" / "sparse_layers.md"
DENSITIES = (0.25, 0.125)
CHANNELS, DEPTH = 256, 3
SECONDS = 3.0
MEMORY_TRIES = 5


def chain(window: int) -> nn.Module:
    """Three convolutions, each with a ReLU; the first reads what nothing else made, so it is sparse too."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, window, padding=window // 2), nn.ReLU()]
    return nn.Sequential(*layers)


def vgg(widths: tuple[int, ...] = (64, 128, 256, 512)) -> nn.Module:
    """Two 3x3 convolutions with batch norm a stage, pooling between them, and a linear classifier."""
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise((3, *widths)):
        for channels in (before, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def memory(path: Path, feed: dict[str, Any], runs: int) -> float:
    return float(np.median([peak_memory(path, feed, runs=runs) for _ in range(MEMORY_TRIES)]))


def measured(model: nn.Module, x: torch.Tensor, first: bool) -> list[str]:
    """Return cells for one network: time, memory and bytes over the dense one's, and the difference."""
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": gp.export(model, x, Path(folder) / "dense.onnx").path}
        files["empty"] = gp.export(nn.ReLU(), x, Path(folder) / "empty.onnx").path
        differences = {}
        for density in DENSITIES:
            masked, _ = SparseConnections(density, share=32, first=first)(model, x)
            lowered, _ = LowerSparseConnections()(masked, x)
            exported = gp.export(lowered, x, Path(folder) / f"{density}.onnx")
            files[str(density)] = exported.path
            with torch.no_grad():
                wanted, found = masked(x), lowered(x)
            differences[density] = float((wanted - found).abs().max() / wanted.abs().max())
        feeds = {name: exported.feed(x) for name in files}
        feeds["empty"] = {"input": x.numpy()}
        times = timed(files, feeds, Runtime(), SECONDS)
        grown = [
            {name: memory(path, feeds[name], runs) for name, path in files.items()}
            for runs in (0, 3)
        ]
        for density in DENSITIES:
            name = str(density)
            time = times[name].steadiest.median / times["dense"].steadiest.median
            loading, running = (
                (its[name] - its["empty"]) / (its["dense"] - its["empty"]) for its in grown
            )
            size = files[name].stat().st_size / files["dense"].stat().st_size
            cells.append(
                f"{time:.3f} ({time / density:.2f}) | {loading:.3f} | {running:.3f} | {size:.3f} | "
                f"{differences[density]:.0e}"
            )
    return cells


def main() -> None:
    torch.manual_seed(0)
    lines = [
        *header("Sparse connections in ONNX Runtime", [Runtime()]),
        "Over the dense network's; in brackets, time over density. Difference: of the lowered network's "
        "outputs to the masked one's, over the largest.",
        "",
        "| network | batch | density | time | memory to load | to run | bytes | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def add(name: str, model: nn.Module, x: torch.Tensor, first: bool) -> None:
        for density, cells in zip(DENSITIES, measured(model.eval(), x, first), strict=True):
            lines.append(f"| {name} | {len(x)} | {density} | {cells} |")
            print(lines[-1], flush=True)

    for window, size, batch in itertools.product((3, 1), (14, 28), (1, 8)):
        x = torch.randn(batch, CHANNELS, size, size)
        add(f"{window}x{window} at {size}x{size}", chain(window), x, first=True)
    for batch in (1, 8):
        add("VGG-style, 32x32", vgg(), torch.randn(batch, 3, 32, 32), first=False)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
