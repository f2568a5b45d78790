"""Accuracy at equal measured latency: cut by latency, by MACs and by channels.

    python benchmarks/equal_latency.py --data FOLDER_OF_FASHION_MNIST

The MobileNet-style network of networks.py, eight images, one CPU thread. First `of="latency"` cuts to 0.7,
0.5 and 0.3 of the original's time; then the ratios of the others are sought until their networks take as
long, by timings in turns with the original. All are chosen by and repaired on the same 512 images without
labels, none is trained; and all of it again with other images.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from fashion_mnist import normalised_part
from tasks import BATCH, CALIBRATION, Task, arguments, fashion

import graphprune as gp
from graphprune.calibration.batches import batches_of
from graphprune.demo.data import sample
from graphprune.importance import ScoringContext, are_losses, scores
from graphprune.onnx_export.providers import Runtime, describe_machine
from graphprune.report.result import Slimmed
from graphprune.runtime.latency import Bench

RESULTS = Path(__file__).parent / "results" / "equal_latency.md"
SHARES = (0.7, 0.5, 0.4, 0.3, 0.2)
UNITS = ("latency", "macs", "channels")
CRITERION = "reconstruction"
SETS = 3  # of calibration images
NEAR = 0.01
SEARCHES = 12


class Once:
    """The criterion, its scores computed once: all cuts are of the same model."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.are_losses = are_losses(CRITERION)
        self.scores: Any = None

    def __call__(self, model: torch.nn.Module, graph: gp.DependencyGraph) -> Any:
        """Return the scores by group."""
        if self.scores is None:
            subject = ScoringContext(model, graph, batches_of(self.task.calibration))
            self.scores = scores(subject, CRITERION)
        return self.scores


def cut(task: Task, inputs: Any, criterion: Once, **options: Any) -> Slimmed:
    return gp.slimmed(task.model, example_inputs=inputs, importance=criterion, **options)


def as_long(
    bench: Bench, task: Task, inputs: Any, criterion: Once, of: str, share: float
) -> tuple[Slimmed, float]:
    """Return what is cut by another unit until it takes that share of the original's time."""
    low, high = 0.0, 0.98
    best: tuple[float, Slimmed, float] | None = None
    for _ in range(SEARCHES):
        ratio = (low + high) / 2
        result = cut(task, inputs, criterion, ratio=ratio, of=of, verify=False)
        found = bench.measured(result.model).seconds / bench.seconds
        if best is None or abs(found - share) < best[0]:
            best = abs(found - share), result, found
        if abs(found / share - 1) <= NEAR:
            break
        low, high = (ratio, high) if found > share else (low, ratio)
    assert best is not None
    return best[1], best[2]


def repaired(task: Task, inputs: Any, result: Slimmed) -> float:
    slim = gp.slim(
        task.model, example_inputs=inputs, plan=result.plan, data=task.calibration, compensate=True
    )
    return task.score(slim)


def calibrated_anew(task: Task, folder: Path) -> Iterator[Task]:
    """Yield the task with one set of calibration images after the other."""
    train = normalised_part(folder, "train")
    for start in range(0, SETS * CALIBRATION, CALIBRATION):
        images, labels = (part[start : start + CALIBRATION].split(BATCH) for part in train)
        yield replace(task, calibration=list(zip(images, labels, strict=True)))


def row(bench: Bench, criteria: list[Once], inputs: Any, share: float) -> str:
    """Return a line of the table: means over the calibration sets, with the standard deviations."""
    accuracies: dict[str, list[float]] = {of: [] for of in UNITS}
    times: dict[str, list[float]] = {of: [] for of in UNITS}
    for criterion in criteria:
        task = criterion.task
        mine = cut(task, inputs, criterion, ratio=1 - share, of="latency")
        left = bench.measured(mine.model).seconds / bench.seconds
        for of in UNITS:
            result, found = (
                (mine, left)
                if of == "latency"
                else as_long(bench, task, inputs, criterion, of, left)
            )
            accuracies[of].append(repaired(task, inputs, result))
            times[of].append(found)
    print(share, accuracies, times, flush=True)
    cells = [
        f"{np.mean(accuracies[of]):.2f} ± {np.std(accuracies[of], ddof=1):.2f} ({np.mean(times[of]):.3f})"
        for of in UNITS
    ]
    return f"| {share:.0%} | {' | '.join(cells)} |"


def main() -> None:
    options = arguments().parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    task = fashion("mobilenet", options)
    tasks = list(calibrated_anew(task, options.data))
    inputs = (sample("test").images[:8],)
    lines = [
        "# Accuracy at equal measured latency",
        "",
        f"MobileNet-style network on Fashion-MNIST, {task.score(task.model):.2f} % whole; eight images, "
        f"one CPU thread; chosen by {CRITERION!r} and repaired on {CALIBRATION} images without labels, not "
        f"trained. Means over {SETS} sets of such images, with standard deviations. In brackets, the share "
        "of the original's time that was measured.",
        "",
        f"{', '.join(describe_machine().values())}, onnxruntime {onnxruntime.__version__}, torch "
        f"{torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
        "| time left | " + " | ".join(f'of="{of}"' for of in UNITS) + " |",
        "| --- | --- | --- | --- |",
    ]
    with Bench(task.model, gp.Inputs.of(inputs), Runtime(), seconds=1.0) as bench:
        criteria = [Once(task) for task in tasks]
        for share in SHARES:
            lines.append(row(bench, criteria, inputs, share))
            RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
