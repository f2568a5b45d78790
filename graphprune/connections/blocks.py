"""Filters that read the same channels, together: what a grouped convolution computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphprune.connections.sites import Connections
from graphprune.reorder import Order


@dataclass(frozen=True)
class Blocks:
    """A division of filters into equal blocks, each with the channels that it reads.

    Attributes:
        filters: by block, `[blocks, filters]`.
        channels: by block, `[blocks, channels]`; some that a block does not read where it reads fewer
            than another.

    """

    filters: npt.NDArray[np.int64]
    channels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, on: Connections) -> Blocks | None:
        """Return the fewest blocks whose filters share their channels; None where nothing is on.

        Filters whose channels are among those of another may share its block.
        """
        sets = np.unique(on, axis=0)
        inside = _inside(sets, sets) & ~np.eye(len(sets), dtype=bool)
        largest = sets[sets.any(1) & ~inside.any(1)]
        if not len(largest):
            return None
        fits = _inside(on, largest)
        members: list[list[int]] = [[] for _ in largest]
        for row in np.argsort(fits.sum(1), kind="stable"):  # those without a choice first
            smallest = min(np.flatnonzero(fits[row]), key=lambda at: len(members[at]))
            members[smallest].append(int(row))
        size = math.gcd(*map(len, members))
        width = max(int(s.sum()) for s in largest)
        found = [
            (sorted(its)[start : start + size], _padded(s, width))
            for s, its in zip(largest, members, strict=True)
            for start in range(0, len(its), size)
        ]
        found.sort(key=lambda block: block[0])
        return cls(np.array([f for f, _ in found]), np.array([c for _, c in found]))

    @property
    def size(self) -> int:
        """How many filters a block has."""
        return int(self.filters.shape[1])

    def moved(self, filters: Order, channels: Order) -> Blocks:
        """Return the same blocks once filters and channels stand in other orders, of old positions."""
        return Blocks(
            np.sort(np.argsort(filters)[self.filters], axis=1),
            np.sort(np.argsort(channels)[self.channels], axis=1),
        )


def _inside(these: Connections, those: Connections) -> Connections:
    """Say of each row whether its channels are among those of another, `[these, those]`."""
    found: Connections = these.astype(np.float32) @ (~those).astype(np.float32).T == 0
    return found


def _padded(channels: npt.NDArray[np.bool_], width: int) -> list[int]:
    """Return the channels of a set in order, with others until there are enough."""
    others = np.flatnonzero(~channels)[: width - int(channels.sum())]
    return sorted([*np.flatnonzero(channels).tolist(), *others.tolist()])
