"""Filters that read the same channels, together: what a grouped convolution computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphprune.shrink.reorder import Order
from graphprune.sparsity.connections.sites import Connections

_SPARE = 1.15  # places of blocks for each filter, at most


@dataclass(frozen=True)
class Blocks:
    """A division of filters into equal blocks, each with the channels that it reads.

    Attributes:
        filters: by block, `[blocks, filters]`; -1 for none, where blocks would not be equal otherwise.
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
        size = _block_size([len(its) for its in members])
        width = max(int(s.sum()) for s in largest)
        found = [
            (its[start : start + size], _padded(s, width))
            for s, its in zip(largest, map(sorted, members), strict=True)
            for start in range(0, len(its), size)
        ]
        found.sort(key=lambda block: block[0])
        filters = [its + [-1] * (size - len(its)) for its, _ in found]
        return cls(np.array(filters), np.array([channels for _, channels in found]))

    @property
    def size(self) -> int:
        """How many filters a block has."""
        return int(self.filters.shape[1])

    def moved(self, filters: Order, channels: Order) -> Blocks:
        """Return the same blocks once filters and channels stand in other orders, of old positions."""
        place = np.append(np.argsort(filters), -1)  # of each filter, and of none
        return Blocks(
            np.sort(place[self.filters], axis=1),
            np.sort(np.argsort(channels)[self.channels], axis=1),
        )


def _block_size(counts: Sequence[int]) -> int:
    """Return the largest size of blocks that leaves few places of theirs without a filter."""
    sizes = range(max(counts), 0, -1)
    return next(s for s in sizes if sum(-(-n // s) * s for n in counts) <= _SPARE * sum(counts))


def _inside(these: Connections, those: Connections) -> Connections:
    """Say of each row whether its channels are among those of another, `[these, those]`."""
    found: Connections = these.astype(np.float32) @ (~those).astype(np.float32).T == 0
    return found


def _padded(channels: npt.NDArray[np.bool_], width: int) -> list[int]:
    """Return the channels of a set in order, with others until there are enough."""
    others = np.flatnonzero(~channels)[: width - int(channels.sum())]
    return sorted([*np.flatnonzero(channels).tolist(), *others.tolist()])
