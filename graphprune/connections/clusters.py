"""Which filters should read the same channels: those that want the same ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Saliency = npt.NDArray[np.float64]
_ROUNDS = 50
_STARTS = 4


def clustered(
    saliency: Saliency, blocks: int, count: int, chance: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the block of each filter and each block's channels, best first, such that little is lost.

    Blocks have equally many filters, and each keeps the `count` channels that matter most to its filters
    together. Filters move to the blocks whose channels suit them, and channels follow, until nothing gets
    better; the best of several starts is kept, consecutive filters being one.

    Args:
        saliency: how much each connection matters, `[outputs, inputs]`, none below zero.
        blocks: how many, a divisor of the outputs.
        count: channels that a block keeps.
        chance: where to start.

    Returns:
        The blocks of the filters, `[outputs]`, and the channels of the blocks in order, `[blocks, inputs]`.

    """
    outputs = len(saliency)
    consecutive = np.repeat(np.arange(blocks), outputs // blocks)
    starts = [consecutive, *(chance.permutation(consecutive) for _ in range(_STARTS - 1))]
    found = [_improved(saliency, start, blocks, count) for start in starts if blocks > 1]
    _, block_of = max(found, key=lambda each: each[0], default=(0.0, consecutive))
    return block_of, np.argsort(-_wanted(saliency, block_of, blocks), axis=1, kind="stable")


def _wanted(saliency: Saliency, block_of: npt.NDArray[np.int64], blocks: int) -> Saliency:
    """Return how much each channel matters to each block, `[blocks, inputs]`."""
    return np.stack([saliency[block_of == block].sum(0) for block in range(blocks)])


def _improved(
    saliency: Saliency, block_of: npt.NDArray[np.int64], blocks: int, count: int
) -> tuple[float, npt.NDArray[np.int64]]:
    """Return what is kept in the end, and the block of each filter."""
    kept = -np.inf
    for _ in range(_ROUNDS):
        wanted = _wanted(saliency, block_of, blocks)
        chosen = np.argsort(-wanted, axis=1, kind="stable")[:, :count]
        total = float(np.take_along_axis(wanted, chosen, 1).sum())
        if total <= kept * (1 + 1e-9):
            break
        kept, best = total, block_of
        gains = np.stack([saliency[:, channels].sum(1) for channels in chosen], axis=1)
        places = np.repeat(gains, len(saliency) // blocks, axis=1)
        block_of = linear_sum_assignment(places, maximize=True)[1] // (len(saliency) // blocks)
    return kept, best
