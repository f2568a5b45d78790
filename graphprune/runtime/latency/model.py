"""Seconds as a function of the channels that are kept: a curve for each part, through what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from graphprune.layout import Axis
from graphprune.runtime.latency.parts import Part

NANO = 1e9


@dataclass(frozen=True)
class LatencyModel:
    """The latency of a model, part by part, in nanoseconds.

    Each part takes what was measured of it, as a function of its work: between two measurements along
    the line, never less for more work. What the parts leave out of the whole is spread over them.

    Attributes:
        parts: in the order in which they run.
        points: by the name of a part, seconds by the work at which they were measured.
        scale: the measured whole over the sum of the parts.

    """

    parts: tuple[Part, ...]
    points: Mapping[str, Mapping[int, float]]
    scale: float = 1.0

    def total(self, kept: Mapping[Axis, int]) -> float:
        """Return nanoseconds a run once only `kept[axis]` slots of each axis of the parts are left."""
        return NANO * self.scale * sum(self.seconds_of(kept).values())

    def _seconds(self, part: Part, kept: Mapping[Axis, int]) -> float:
        points = self.points[part.name]
        amounts = sorted(points)
        # More work never takes less: a time below that of less work is raised to it.
        seconds = np.maximum.accumulate([points[amount] for amount in amounts])
        amount = part.amount(kept)
        # One point: in proportion. Below the first: along the first line, but not below 0.
        if len(amounts) == 1:
            return float(seconds[0]) * amount / max(amounts[0], 1)
        if amount < amounts[0]:
            slope = (seconds[1] - seconds[0]) / (amounts[1] - amounts[0])
            return max(float(seconds[0] - slope * (amounts[0] - amount)), 0.0)
        return float(np.interp(amount, amounts, seconds))

    def add_measurement(
        self, kept: Mapping[Axis, int], by_part: Mapping[str, float], total_seconds: float
    ) -> LatencyModel:
        """Return the model that agrees with one more measurement.

        Args:
            kept: how many slots of each axis of the parts were left.
            by_part: seconds of each part.
            total_seconds: of the whole model.

        """
        points = {
            part.name: {
                **self.points.get(part.name, {}),
                part.amount(kept): by_part.get(part.name, 0.0),
            }
            for part in self.parts
        }
        # Scaled by this measurement alone, so that the model gives it exactly.
        unscaled = replace(self, points=points, scale=1.0)
        unscaled_total = unscaled.total(kept)
        return replace(
            unscaled, scale=total_seconds * NANO / unscaled_total if unscaled_total else self.scale
        )

    def seconds_of(self, kept: Mapping[Axis, int]) -> dict[str, float]:
        """Return the seconds of each part, as its curve says, without what the parts leave out."""
        return {part.name: self._seconds(part, kept) for part in self.parts}


@dataclass(frozen=True)
class GroupLatency:
    """A latency model as what the slots of a graph's groups cost.

    Attributes:
        model: of the parts.
        axes: by axis of the parts, the axis of the graph.

    """

    model: LatencyModel
    axes: Mapping[Axis, Axis]

    def total(self, kept: Mapping[Axis, int] | None = None) -> float:
        """Return nanoseconds a run once only `kept[axis]` slots of each axis of the graph are left."""
        return self.model.total(map_kept_to_parts(self.axes, kept or {}))


def map_kept_to_parts(axes: Mapping[Axis, Axis], kept: Mapping[Axis, int]) -> dict[Axis, int]:
    """Return the slots that are left by the parts' own axes."""
    return {
        part_axis: kept[graph_axis] for part_axis, graph_axis in axes.items() if graph_axis in kept
    }
