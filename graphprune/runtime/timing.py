"""Latency of models, measured in turns so that the machine's moods cancel."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from graphprune.errors import InvalidRequestError
from graphprune.onnx_export.export import Feed
from graphprune.onnx_export.providers import (
    Runtime,
    convert_precision,
    default_runtimes,
    open_session,
)
from graphprune.utils.inputs import Inputs, call

SAMPLE_SECONDS = 5e-3  # one sample repeats the model for at least this long
WARM_UPS = 5
LEAST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds a run: the median of the samples, their quartiles and the smallest."""

    median: float
    low: float
    high: float
    minimum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Return the spread of some samples, in seconds a run."""
        low, median, high = (float(q) for q in np.quantile(samples, [0.25, 0.5, 0.75]))
        return cls(median, low, high, min(samples))


@dataclasses.dataclass(frozen=True)
class Latency:
    """What one model took on one provider: `rounds` samples of `runs` runs each.

    `cpu` is the processor time of the calling thread, which does all the work when there is one
    thread on the CPU provider, and leaves out the time other processes took; otherwise None.
    """

    wall: Spread
    cpu: Spread | None
    rounds: int
    runs: int

    @property
    def steadiest(self) -> Spread:
        """The processor time where it was measured, else the time on the wall."""
        return self.cpu or self.wall


def time_onnx(
    models: Mapping[str, Path],
    feeds: Mapping[str, Feed],
    *,
    runtimes: Sequence[Runtime] | None = None,
    seconds: float = 3.0,
) -> dict[str, dict[str, Latency]]:
    """Return the latency of each model, by the name of the runtime and then by the model's.

    The models take turns, in a new random order each round, after a warm-up. A sample repeats the
    model until it lasts 5 ms; CUDA samples run on inputs and outputs that stay on the device.

    Args:
        models: a name and an ONNX file each.
        feeds: for each name, the arrays that the file's inputs take.
        runtimes: where to run them; by default one thread of the CPU, and accelerators that are here.
        seconds: time to spend on each model and runtime, exceeded only by models so slow that
            three rounds take longer.

    Raises:
        InvalidRequestError: a model has no feed, or ONNX Runtime cannot start a provider.

    """
    missing = sorted(set(models) - set(feeds))
    if missing:
        raise InvalidRequestError(f"no feeds for {', '.join(missing)}; each model needs its own")
    chosen = default_runtimes() if runtimes is None else runtimes
    return {str(runtime): _time_on(runtime, models, feeds, seconds) for runtime in chosen}


class _Subject:
    """One model under measurement."""

    def __init__(self, run: Callable[[], Any], budget: float) -> None:
        self.run = run
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.runs = max(1, math.ceil(SAMPLE_SECONDS / self._warm(budget)))

    def _warm(self, budget: float) -> float:
        """Run a few times, and return the shortest run in seconds."""
        start = time.perf_counter()
        # The shortest, since the first runs may still compile, allocate and fill caches.
        shortest = math.inf
        for _ in range(WARM_UPS):
            run_start = time.perf_counter()
            self.run()
            shortest = min(shortest, time.perf_counter() - run_start)
            if time.perf_counter() - start > budget / 4:
                break
        return shortest

    def sample(self) -> None:
        """Take one sample: seconds a run, by both clocks."""
        cpu, wall = time.thread_time(), time.perf_counter()
        for _ in range(self.runs):
            self.run()
        self.walls.append((time.perf_counter() - wall) / self.runs)
        self.cpus.append((time.thread_time() - cpu) / self.runs)

    def latency(self, one_thread: bool) -> Latency:
        """Return the samples' spread; the thread's clock counts if it did all the work."""
        cpu = Spread.of(self.cpus) if one_thread else None
        return Latency(Spread.of(self.walls), cpu, len(self.walls), self.runs)


def _time_on(
    runtime: Runtime, models: Mapping[str, Path], feeds: Mapping[str, Feed], seconds: float
) -> dict[str, Latency]:
    """Return the latency of each model on one runtime."""
    runs = {name: _runner(path, feeds[name], runtime) for name, path in models.items()}
    return time_in_turns(runs, seconds, one_thread=runtime.is_one_thread)


def time_in_turns(
    runs: Mapping[str, Callable[[], Any]], seconds: float, *, one_thread: bool
) -> dict[str, Latency]:
    """Return what some calls take, each in turn, in a new random order each round.

    Args:
        runs: the calls.
        seconds: for each of them.
        one_thread: whether the calling thread does all the work.

    """
    subjects = {name: _Subject(run, seconds) for name, run in runs.items()}
    order = list(subjects.values())
    # A seed of its own: the same orders each time, and the caller's random numbers stay as they are.
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds * len(order)
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        shuffle(order)
        for subject in order:
            subject.sample()
        rounds += 1
    return {name: subject.latency(one_thread) for name, subject in subjects.items()}


def time_torch(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    compiled: bool = False,
    threads: int = 1,
    seconds: float = 3.0,
) -> dict[str, Latency]:
    """Return the latency of each model in PyTorch on the CPU, by its name.

    Args:
        models: in evaluation; they take turns.
        inputs: what they are run on.
        compiled: whether they are compiled first, by torch.compile, which needs a C++ compiler.
        threads: threads inside an operator.
        seconds: time to spend on each model.

    """
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = {}
        for name, model in models.items():
            runnable: Any = torch.compile(model) if compiled else model
            runs[name] = partial(call, runnable, inputs)
        return time_in_turns(runs, seconds, one_thread=threads == 1)
    finally:
        torch.set_num_threads(previous_threads)


def _runner(path: Path, feed: Feed, runtime: Runtime) -> Callable[[], Any]:
    """Return a call that runs the file once, to the end."""
    session = open_session(convert_precision(path, runtime.precision), runtime)
    if runtime.device == "cpu":
        return lambda: session.run(None, feed)
    return _runner_on_device(session, feed, runtime.device)


def _runner_on_device(session: ort.InferenceSession, feed: Feed, device: str) -> Callable[[], Any]:
    """Return a call that runs the session once, with its inputs and outputs kept on the device."""
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for value in session.get_outputs():
        binding.bind_output(value.name, device)

    def run() -> None:
        session.run_with_iobinding(binding)
        # A GPU may still be at work when the call returns.
        binding.synchronize_outputs()

    return run
