"""What blocks of zeros save in recurrent and linear layers in ONNX Runtime, and what pruning costs.

    python benchmarks/sparse_recurrent_layers.py

Layers of 1,760 units, as the paper's (arXiv 1704.05119), on 20 steps; cut by `SparseRecurrent` and lowered
by `LowerSparseRecurrent`, against ONNX Runtime's own operator on dense weights, one CPU thread, in turns.
Training: a step of the optimiser on a GRU of 512 units, with and without `GradualSparsity`, in turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from graphprune.passes import LowerSparseLinear, LowerSparseRecurrent, SparseRecurrent
from latency import header, timed
from torch import Tensor, nn

import graphprune as gp
from graphprune.onnx_export.providers import Runtime
from graphprune.runtime.timing import time_in_turns

RESULTS = Path(__file__).parent / "results" / "sparse_recurrent_layers.md"
UNITS, LENGTH, BATCHES = 1760, 20, (1, 8, 32)
BLOCKS = ((32, 32), (32, 8), (160, 1))
SPARSITIES = (0.8, 0.9, 0.95)
SHAPES = ((1, 20), (8, 20), (3, 7))  # batch and length at which outputs are compared
SECONDS = 3.0
TRAINED = 512


class Recurrent(nn.Module):
    """One recurrent layer."""

    def __init__(self, kind: Any, units: int) -> None:
        super().__init__()
        self.recurrent = kind(units, units, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, length, units]` to the same shape."""
        output: Tensor = self.recurrent(x)[0]
        return output


def cut_linear(layer: nn.Module, sparsity: float, block: tuple[int, int]) -> nn.Module:
    """Return a copy with so many blocks zero."""
    cut = nn.Linear(UNITS, UNITS)
    cut.load_state_dict(layer.state_dict())
    schedule = gp.GradualSparsity(
        cut, start=0, end=2, every=1, schedule="hard", sparsity=sparsity, block=block, balanced=True
    )
    for _ in range(2):
        schedule.step()
    return cut.eval()


def difference(one: nn.Module, other: nn.Module, inputs: list[Tensor]) -> float:
    """Return the largest difference over the inputs, relative to the largest output."""
    found = 0.0
    with torch.no_grad():
        for x in inputs:
            wanted = one(x)
            found = max(found, float((other(x) - wanted).abs().max() / wanted.abs().max()))
    return found


def layer_rows(name: str, dense: nn.Module, *, linear: bool) -> list[str]:
    """Return a line for each sparsity and block: speed-ups by batch, file and difference."""
    shapes = [(batch,) if linear else (batch, LENGTH) for batch in BATCHES]
    x = torch.randn(*shapes[0], UNITS)
    free = None if linear else {"x": {1: "length"}}
    compared = [torch.randn(*(s[:1] if linear else s), UNITS) for s in SHAPES]
    with tempfile.TemporaryDirectory() as folder:
        whole = gp.export(dense, x, Path(folder) / "dense.onnx", free=free)
        files, differences, zeros = {"dense": whole.path}, {}, {}
        for sparsity in SPARSITIES:
            for block in BLOCKS:
                if linear:
                    masked = cut_linear(dense, sparsity, block)
                    lowered = LowerSparseLinear(measured=False)(masked, x).graph_module
                else:
                    masked = SparseRecurrent(sparsity, block)(dense, x).graph_module
                    lowered = LowerSparseRecurrent(measured=False)(masked, x).graph_module
                key = f"{sparsity} {block[0]}x{block[1]}"
                files[key] = gp.export(lowered, x, Path(folder) / f"{key}.onnx", free=free).path
                differences[key] = difference(masked, lowered, compared)
                weights = [w for w in masked.parameters() if w.dim() > 1]
                zeros[key] = float(torch.cat([(w == 0).flatten() for w in weights]).float().mean())
        times = []
        for shape in shapes:
            feed = whole.feed(torch.randn(*shape, UNITS))
            times.append(timed(files, dict.fromkeys(files, feed), Runtime(), SECONDS))
        lines = []
        for key, off in differences.items():
            ratios = [t["dense"].steadiest.median / t[key].steadiest.median for t in times]
            size = files[key].stat().st_size / whole.bytes
            speed_ups = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            block = key.split()[1]
            lines.append(
                f"| {name} | {zeros[key]:.1%} | {block} | {speed_ups} | {size:.3f} | {off:.0e} |"
            )
            print(lines[-1], flush=True)
    return lines


def training_step(block: tuple[int, int] | None) -> Any:
    """Return a call that takes one step of training, pruned in blocks or not at all."""
    torch.manual_seed(0)
    model = Recurrent(nn.GRU, TRAINED)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = None
    if block is not None:
        schedule = gp.GradualSparsity(
            model, start=0, end=10**6, every=100, schedule="cubic", block=block,
            balanced=block != (1, 1),
        )  # fmt: skip
    x = torch.randn(32, 64, TRAINED)

    def step() -> None:
        loss = model(x).square().mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if schedule is not None:
            schedule.step()

    return step


def training_rows() -> list[str]:
    steps = {
        "dense": training_step(None),
        "weights": training_step((1, 1)),
        "32x32": training_step((32, 32)),
    }
    times = time_in_turns(steps, 20.0, one_thread=True)
    dense = times["dense"].steadiest.median
    return [
        f"| {name} | {1e3 * latency.steadiest.median:.0f} ms | {latency.steadiest.median / dense:.3f} |"
        for name, latency in times.items()
    ]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines = [
        *header("Block-sparse recurrent and linear layers in ONNX Runtime", [Runtime()]),
        f"{UNITS:,} units to {UNITS:,}, {LENGTH} steps (linear: one vector each): how many times faster "
        "than ONNX Runtime's own operator on dense weights; file over the dense one; difference to the "
        "masked layer in PyTorch at three shapes, over the largest output.",
        "",
        "| layer | zeros | block | "
        + " | ".join(f"batch {b}" for b in BATCHES)
        + " | file | difference |",
        "| --- | --- | --- | " + " --- |" * (len(BATCHES) + 2),
    ]
    for name, kind in (("GRU", nn.GRU), ("LSTM", nn.LSTM), ("RNN", nn.RNN)):
        lines += layer_rows(name, Recurrent(kind, UNITS).eval(), linear=False)
    lines += layer_rows("linear", nn.Linear(UNITS, UNITS).eval(), linear=True)
    lines += [
        "",
        f"A step of training, GRU of {TRAINED} units, 32 sequences of 64 steps, PyTorch on one CPU thread:",
        "",
        "| pruned by | time | over dense |",
        "| --- | --- | --- |",
        *training_rows(),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
