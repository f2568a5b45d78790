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
        channel_sets = np.unique(on, axis=0)
        # every set is inside itself, which makes none superfluous
        inside = _is_subset(channel_sets, channel_sets) & ~np.eye(len(channel_sets), dtype=bool)
        largest_sets = channel_sets[channel_sets.any(1) & ~inside.any(1)]
        if not len(largest_sets):
            return None
        fits = _is_subset(on, largest_sets)
        filters_by_set: list[list[int]] = [[] for _ in largest_sets]
        for row in np.argsort(fits.sum(1), kind="stable"):  # those without a choice first
            smallest = min(
                np.flatnonzero(fits[row]), key=lambda set_index: len(filters_by_set[set_index])
            )
            filters_by_set[smallest].append(int(row))
        # sets of 5 and 3 filters in blocks of 3: filters 3 + 2 and 3, the 2 filled up with a -1
        size = _block_size([len(set_filters) for set_filters in filters_by_set])
        width = max(int(channel_set.sum()) for channel_set in largest_sets)
        blocks = [
            (set_filters[start : start + size], _pad_channels(channel_set, width))
            for channel_set, set_filters in zip(
                largest_sets, map(sorted, filters_by_set), strict=True
            )
            for start in range(0, len(set_filters), size)
        ]
        blocks.sort(key=lambda block: block[0])
        filters = [set_filters + [-1] * (size - len(set_filters)) for set_filters, _ in blocks]
        return cls(np.array(filters), np.array([channels for _, channels in blocks]))

    @property
    def size(self) -> int:
        """How many filters a block has."""
        return int(self.filters.shape[1])

    def reorder(self, filters: Order, channels: Order) -> Blocks:
        """Return the same blocks once filters and channels stand in other orders, of old positions."""
        # of each old one; -1, which is no filter, reads the last entry and stays -1
        new_position = np.append(np.argsort(filters), -1)
        return Blocks(
            np.sort(new_position[self.filters], axis=1),
            np.sort(np.argsort(channels)[self.channels], axis=1),
        )


def _block_size(counts: Sequence[int]) -> int:
    """Return the largest size of blocks that leaves few places of theirs without a filter."""
    sizes = range(max(counts), 0, -1)
    return next(s for s in sizes if sum(-(-n // s) * s for n in counts) <= _SPARE * sum(counts))


def _is_subset(these: Connections, those: Connections) -> Connections:
    """Say of each row whether its channels are among those of another, `[these, those]`."""
    # `[these, inputs] @ [inputs, those]` counts the channels of one that the other lacks
    is_subset: Connections = these.astype(np.float32) @ (~those).astype(np.float32).T == 0
    return is_subset


def _pad_channels(channels: npt.NDArray[np.bool_], width: int) -> list[int]:
    """Return the channels of a set in order, with others until there are enough."""
    fillers = np.flatnonzero(~channels)[: width - int(channels.sum())]
    return sorted([*np.flatnonzero(channels).tolist(), *fillers.tolist()])
