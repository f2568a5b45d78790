"""A model and slimmer versions of it in ONNX Runtime: exported, profiled and timed beside each other."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from graphprune.distributed.process_group import current_ranks
from graphprune.errors import ExportError, GraphPruneWarning
from graphprune.groups.groups import Dependencies
from graphprune.layout import Axis
from graphprune.masks import count_kept_slots
from graphprune.onnx_export.export import Feed, TracedExport, export_traced
from graphprune.onnx_export.providers import Runtime
from graphprune.runtime.latency.cache import LatencyCache
from graphprune.runtime.latency.model import GroupLatency, LatencyModel, map_kept_to_parts
from graphprune.runtime.latency.parts import PartitionedProgram
from graphprune.runtime.profiling import profile_nodes
from graphprune.runtime.timing import time_onnx
from graphprune.selection.plan import Plan
from graphprune.utils.inputs import Inputs

# Times that differ by less than this factor may be the same, measured twice; what is a smaller share of the
# whole than the second is not looked at; a part that ran within others, so that it took nothing of its own,
# is kept as the third, in seconds.
_FACTOR, _LITTLE, _NOTHING = 2.0, 0.01, 1e-9


@dataclass(frozen=True)
class SlimTiming:
    """What one slim model took.

    Attributes:
        seconds: a run, with the original taken at what it took first.
        by_part: seconds by the name of the original's part, as ONNX Runtime's profiler gives them.

    """

    seconds: float
    by_part: dict[str, float]


@dataclass(frozen=True)
class LatencyOutcome:
    """What was asked of a latency and what was measured, in milliseconds a run.

    Attributes:
        original: of the original.
        target: what was asked for.
        slim: of the slim model, timed in turns with the original.
        runtime: where.

    """

    original: float
    target: float
    slim: float
    runtime: str

    def __str__(self) -> str:
        return (
            f"{self.slim:.3g} ms on {self.runtime}, where {self.target:.3g} ms were asked for and the "
            f"original takes {self.original:.3g} ms"
        )


class Bench:
    """Where models are measured beside their original; used as a context, for its files.

    Args:
        model: the original.
        inputs: what it is run on.
        runtime: where.
        seconds: for each model, on each of timing and profiling.

    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, runtime: Runtime, seconds: float = 2.0
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.runtime = runtime
        self.duration = seconds
        self.cache = LatencyCache(runtime)
        self.files = 0
        self.ranks = current_ranks()
        self.trusted: list[dict[str, str]] = []  # signatures by part, that the disk had

    def __enter__(self) -> Self:
        """Export, profile and time the original."""
        self.folder = tempfile.TemporaryDirectory()
        self.original = self._export(self.model)
        self.feed = self.original.exported.feed(self.inputs)
        self.program = PartitionedProgram(self.original, self.inputs)
        events = self._profile_by_node(self.original)
        self.part_of = self.program.parts(events)
        self.parts = tuple({part.name: part for part in self.part_of.values()}.values())
        self.by_part = self._sum_by_part(events)
        if not self.by_part:
            raise ExportError(
                "nothing that ONNX Runtime runs could be traced back to the model's operators, so its "
                "latency cannot be divided among its channels"
            )
        self.seconds = self._time_models({"original": self.original})["original"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the files."""
        self.folder.cleanup()

    def build_latency_model(self) -> LatencyModel:
        """Return the latency, known at full size alone."""
        # Without a count for any axis, all slots are there.
        return LatencyModel(self.parts, {}).add_measurement({}, self.by_part, self.seconds)

    def of_groups(self, latency: LatencyModel, graph: Dependencies) -> GroupLatency:
        """Return the latency as a cost of the groups of a graph of the original."""
        return GroupLatency(latency, self.program.axes_of(graph))

    def count_kept(self, plan: Plan, graph: Dependencies) -> dict[Axis, int]:
        """Return how many slots of each axis of the parts a plan leaves."""
        return map_kept_to_parts(self.program.axes_of(graph), count_kept_slots(plan.masks(graph)))

    def measure(self, slim: nn.Module) -> SlimTiming:
        """Return what a slim model takes; it is timed in turns with the original."""
        traced = self._export(slim)
        by_part = self._sum_by_part(self._profile_by_node(traced))
        seconds = self._time_models({"original": self.original, "slim": traced})
        traced.exported.path.unlink()
        # As if the machine were as fast now as when the original was timed first.
        return SlimTiming(self.seconds * seconds["slim"] / seconds["original"], by_part)

    def measure_parts(self, kept: Mapping[Axis, int], slim: nn.Module) -> dict[str, float]:
        """Return the seconds of the parts of a slim model, from the disk where they were measured before.

        Args:
            kept: how many slots of each axis of the parts it has.
            slim: the model.

        """
        signatures = {part.name: part.signature(kept) for part in self.parts}
        cached = self._run_in_first_process(lambda: self._read_cached(signatures))
        if cached.keys() == signatures.keys() and self._is_plausible(cached, kept):
            self.trusted.append(signatures)
            return cached
        by_part = self._sum_by_part(self._profile_by_node(self._export(slim)))
        self.remember(kept, by_part)
        return by_part

    def _read_cached(self, signatures: Mapping[str, str]) -> dict[str, float]:
        """Return the seconds of the parts that were measured before."""
        cached = self.cache.seconds
        return {name: cached[key] for name, key in signatures.items() if key in cached}

    def _is_plausible(self, by_part: Mapping[str, float], kept: Mapping[Axis, int]) -> bool:
        """Say whether times of a slim model can be those of parts of this original, just measured.

        A part that does less takes no longer, and by no more less than it does less: by a factor, which
        measuring and other ways to run it may make, and but for what hardly shows in the whole.
        """
        total, proportional_total, slack = 0.0, 0.0, _LITTLE * sum(self.by_part.values())
        for part in self.parts:
            # What is kept of the part's work, 30 of 100 say, should take 30% to 100% of its seconds.
            original_seconds, seconds = self.by_part.get(part.name, 0.0), by_part[part.name]
            proportional = original_seconds * part.amount(kept) / max(part.amount({}), 1)
            if seconds > _FACTOR * original_seconds + slack:
                return False
            if _NOTHING < seconds < proportional / _FACTOR - slack:
                return False
            total, proportional_total = total + seconds, proportional_total + proportional
        return total >= proportional_total / _FACTOR

    def remember(self, kept: Mapping[Axis, int], by_part: Mapping[str, float]) -> None:
        """Keep on the disk what the parts of a slim model took."""
        if self.ranks.rank == 0:
            # Not 0, which the cache would not take for a time.
            self.cache.add(
                {part.signature(kept): by_part.get(part.name) or _NOTHING for part in self.parts}
            )

    def doubt(self, expected: Mapping[str, float], by_part: Mapping[str, float]) -> None:
        """Forget what the disk said of parts of which something else than it led to expect was measured."""
        slack = _LITTLE * sum(self.by_part.values())
        odd_parts = {
            name
            for name, seconds in expected.items()
            if _is_different(seconds, by_part.get(name, 0.0), slack)
        }
        doubtful = [
            key
            for signatures in self.trusted
            for name, key in signatures.items()
            if name in odd_parts
        ]
        if doubtful and self.ranks.rank == 0:
            self.cache.forget(doubtful)

    def _run_in_first_process(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Measure in the first process of a group, while the others wait, and tell them."""
        self.ranks.gather(None)  # so that nothing else runs where they share a machine
        seconds_by_name: dict[str, float] = self.ranks.gather(
            measure() if self.ranks.rank == 0 else None
        )[0]
        return seconds_by_name

    def _export(self, model: nn.Module) -> TracedExport:
        self.files += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphPruneWarning)  # of a batch that is not free
            path = Path(self.folder.name) / f"{self.files}.onnx"
            return export_traced(model, self.inputs, path)

    def _profile_by_node(self, traced: TracedExport) -> dict[str, float]:
        """Return seconds by the node of the traced program that they end with."""

        def measure() -> dict[str, float]:
            by_node: dict[str, float] = {}
            for event in profile_nodes(
                traced.exported.path, self.feed, self.runtime, self.duration
            ):
                node = traced.origins.get(event.source)
                if node is not None:
                    by_node[node] = by_node.get(node, 0.0) + event.seconds
            return by_node

        return self._run_in_first_process(measure)

    def _sum_by_part(self, by_node: Mapping[str, float]) -> dict[str, float]:
        by_part: dict[str, float] = {}
        for node, seconds in by_node.items():
            part = self.part_of.get(node)
            if part is not None:
                by_part[part.name] = by_part.get(part.name, 0.0) + seconds
        return by_part

    def _time_models(self, exports: Mapping[str, TracedExport]) -> dict[str, float]:
        feeds: dict[str, Feed] = dict.fromkeys(exports, self.feed)
        paths = {name: traced.exported.path for name, traced in exports.items()}

        def measure() -> dict[str, float]:
            latencies = time_onnx(paths, feeds, runtimes=[self.runtime], seconds=self.duration)
            return {
                name: latency.steadiest.median
                for name, latency in latencies[str(self.runtime)].items()
            }

        return self._run_in_first_process(measure)


def _is_different(expected: float, measured: float, slack: float) -> bool:
    """Say whether two times are more than a factor apart, but for the slack."""
    low, high = sorted((expected, measured))
    return high > _FACTOR * low + slack
