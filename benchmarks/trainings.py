"""Trainings that are run once and kept, by several processes if asked.

A training is a row: what identifies it, and what came out. Rows are lines of a JSON file in the cache;
whoever starts again goes on where the file ends. The files of several machines may be put one behind
the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Job(NamedTuple):
    """What identifies a training."""

    net: str
    method: str
    fraction: float
    seed: int


Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, nets: Iterable[str], seeds: int) -> None:
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--net", choices=list(nets), required=True)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--device", default="cpu", help="of the trainings")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="a few short trainings and no report")
    parser.add_argument("--report", action="store_true", help="no training")
    parser.add_argument("--train", action="store_true", help="no report")


class Kept:
    """The rows of a file, by what identifies them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: dict[Job, Row] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[Job(*(row[name] for name in Job._fields))] = row

    def add(self, job: Job, found: Row) -> None:
        """Keep what came out of a job."""
        self.rows[job] = job._asdict() | found
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[job]) + "\n")
        print(self.rows[job], flush=True)

    def run(self, work: Callable[[Job], Row], jobs: Iterable[Job], workers: int) -> None:
        """Run the jobs that there are no rows of, in their order; several processes if asked."""
        todo = [job for job in jobs if job not in self.rows]
        if workers == 1:
            for job in todo:
                self.add(job, work(job))
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            futures = {pool.submit(work, job): job for job in todo}
            for future in as_completed(futures):
                try:
                    self.add(futures[future], future.result())
                except Exception as error:  # the others go on; this one will be tried again
                    print(f"{futures[future]} failed: {error!r}", flush=True)

    def by_method(self, net: str) -> dict[tuple[str, float], list[Row]]:
        """Return the rows of a network, those that differ in the seed together."""
        found: dict[tuple[str, float], list[Row]] = {}
        for job, row in sorted(self.rows.items()):
            if job.net == net:
                found.setdefault((job.method, job.fraction), []).append(row)
        return found


def mean_and_spread(rows: Iterable[Row], name: str) -> tuple[float, float]:
    """Return the mean over the seeds and the standard deviation, zero of a single one."""
    values = np.array([row[name] for row in rows])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def with_spread(mean: float, spread: float, digits: int = 2) -> str:
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")


def all_jobs(net: str, methods: dict[str, tuple[float, ...]], seeds: int) -> Iterator[Job]:
    """Yield every method of one seed before the next seed."""
    for seed in range(seeds):
        for method, fractions in methods.items():
            for fraction in fractions:
                yield Job(net, method, fraction, seed)


def plot(
    points: dict[str, list[tuple[float, ...]]], words: tuple[str, str, str], of: str, path: Path
) -> None:
    """Draw what came out against three costs; a point is these, its value and its spread."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    colours = mpl.colormaps["tab20"](np.linspace(0, 1, len(points)))
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), sharey=True)
    for at, (panel, word) in enumerate(zip(panels, words, strict=True)):
        for (method, its), colour in zip(points.items(), colours, strict=True):
            x, y, error = ([point[i] for point in sorted(its)] for i in (at, 3, 4))
            panel.errorbar(x, y, yerr=error, marker="o", capsize=2, label=method, color=colour)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xlabel(word)
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel(of)
    panels[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
