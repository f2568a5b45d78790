"""Which filters should read the same channels: those that want the same ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Saliency = npt.NDArray[np.float64]
_ROUNDS = 50
_STARTS = 4


def clustered(
    saliency: Saliency, block_of: npt.NDArray[np.int64], count: int, chance: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the block of each filter and each block's channels, best first, such that little is lost.

    Each block keeps the `count` channels that matter most to its filters together. Filters change places
    with those of blocks whose channels suit them, and channels follow, until nothing gets better; the best
    of several starts is kept, the given one being among them.

    Args:
        saliency: how much each connection matters, `[outputs, inputs]`, none below zero.
        block_of: the block of each filter at first, `[outputs]`; blocks keep their sizes.
        count: channels that a block keeps.
        chance: where to start.

    Returns:
        The blocks of the filters, `[outputs]`, and the channels of the blocks in order, `[blocks, inputs]`.

    """
    starts = [block_of, *(chance.permutation(block_of) for _ in range(_STARTS - 1))]
    _, best = max((_improved(saliency, start, count) for start in starts), key=lambda each: each[0])
    return best, np.argsort(-_wanted(saliency, best), axis=1, kind="stable")


def _wanted(saliency: Saliency, block_of: npt.NDArray[np.int64]) -> Saliency:
    """Return how much each channel matters to each block, `[blocks, inputs]`."""
    return np.stack([saliency[block_of == block].sum(0) for block in range(block_of.max() + 1)])


def _improved(
    saliency: Saliency, block_of: npt.NDArray[np.int64], count: int
) -> tuple[float, npt.NDArray[np.int64]]:
    """Return what is kept in the end, and the block of each filter."""
    kept, places = -np.inf, np.sort(block_of)
    for _ in range(_ROUNDS):
        wanted = _wanted(saliency, block_of)
        chosen = np.argsort(-wanted, axis=1, kind="stable")[:, :count]
        total = float(np.take_along_axis(wanted, chosen, 1).sum())
        if total <= kept * (1 + 1e-9):
            break
        kept, best = total, block_of
        gains = np.stack([saliency[:, channels].sum(1) for channels in chosen], axis=1)
        block_of = places[linear_sum_assignment(gains[:, places], maximize=True)[1]]
    return kept, best
