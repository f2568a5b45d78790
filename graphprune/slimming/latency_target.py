"""Cutting to a latency: choose by what was measured of the parts, measure the result, and correct."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.errors import warn
from graphprune.report.result import Slimmed
from graphprune.runtime.latency import Bench, LatencyModel, LatencyOutcome
from graphprune.selection.request import Request
from graphprune.utils.progress import track

# Before anything is chosen, the parts are measured with these fractions of the channels of each group.
_WIDTHS = (0.5, 0.25)

_ATTEMPTS = 6

# A result nearer to the target than the first is as good as measuring allows; one that is farther than the
# second is warned about.
_NEAR, _FAR = 0.02, 0.05


def calibrate(bench: Bench, at_width: Callable[[float], Slimmed]) -> LatencyModel:
    """Return the latency as measured at full size and at smaller ones.

    Args:
        bench: where the original was measured.
        at_width: gives the model with about this fraction of each group.

    """
    latency = bench.build_latency_model()
    for width in track(_WIDTHS, "measuring the parts"):
        slim = at_width(width)
        kept = bench.count_kept(slim.plan, slim.graph)
        by_part = bench.measure_parts(kept, slim.model)
        # not timed: the original's time, in proportion to what the profiler says of the parts of both
        model_seconds = bench.seconds * sum(by_part.values()) / sum(bench.by_part.values())
        latency = latency.add_measurement(kept, by_part, model_seconds)
    return latency


def search_latency(
    bench: Bench,
    latency: LatencyModel,
    attempt: Callable[[LatencyModel], Slimmed],
    target: float,
) -> tuple[LatencyModel, LatencyOutcome]:
    """Return the latency model by which the choice comes nearest to a target, and what was measured.

    Args:
        bench: where the original was measured.
        latency: what is known so far.
        attempt: gives the slim model that is chosen by a latency model.
        target: milliseconds.

    """
    best: tuple[float, LatencyModel, float] | None = None
    tried_counts = []
    for _ in track(range(_ATTEMPTS), "meeting the latency"):
        slim = attempt(latency)
        kept = bench.count_kept(slim.plan, slim.graph)
        # the same numbers of channels again: measuring them once more would teach nothing
        if kept in tried_counts:
            break
        tried_counts.append(kept)
        measured = bench.measure(slim.model)
        bench.doubt(latency.seconds_of(kept), measured.by_part)
        bench.remember(kept, measured.by_part)
        miss = abs(measured.seconds * 1e3 / target - 1)
        if best is None or miss < best[0]:
            best = miss, latency, measured.seconds
        if miss <= _NEAR:
            break
        latency = latency.add_measurement(kept, measured.by_part, measured.seconds)
    assert best is not None  # the first attempt is always new
    _, latency, seconds = best
    return latency, LatencyOutcome(bench.seconds * 1e3, target, seconds * 1e3, str(bench.runtime))


def warn_of_missed(reached: LatencyOutcome, request: Request) -> None:
    """Warn where the latency asked for was not met, unless the original has it."""
    if abs(reached.slim / reached.target - 1) <= _FAR or reached.target >= reached.original:
        return
    if reached.slim < reached.target:
        why = "the numbers of channels allowed are no finer"
        why += "" if request.align == 1 else "; align=1 may come nearer"
    else:
        option = "" if request.renormalised else "renormalised=True or "
        why = f"no more can be cut as asked; {option}other patterns may free more"
    warn(f"the slim model takes {reached}: {why}")
