"""Which filters should read the same channels: those that want the same ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Saliency = npt.NDArray[np.float64]
_ROUNDS = 50
_STARTS = 4


def cluster_filters(
    saliency: Saliency, block_of: npt.NDArray[np.int64], count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the block of each filter and each block's channels, best first, such that little is lost.

    Each block keeps the `count` channels that matter most to its filters together. Filters change places
    with those of blocks whose channels suit them, and channels follow, until nothing gets better; the best
    of several starts is kept, the given one being among them.

    Args:
        saliency: how much each connection matters, `[outputs, inputs]`, none below zero.
        block_of: the block of each filter at first, `[outputs]`; blocks keep their sizes.
        count: channels that a block keeps.
        rng: where to start.

    Returns:
        The blocks of the filters, `[outputs]`, and the channels of the blocks in order, `[blocks, inputs]`.

    """
    starts = [block_of, *(rng.permutation(block_of) for _ in range(_STARTS - 1))]
    _, best = max(
        (_improve(saliency, start, count) for start in starts), key=lambda outcome: outcome[0]
    )
    return best, np.argsort(-_sum_by_block(saliency, best), axis=1, kind="stable")


def _sum_by_block(saliency: Saliency, block_of: npt.NDArray[np.int64]) -> Saliency:
    """Return how much each channel matters to each block, `[blocks, inputs]`."""
    return np.stack([saliency[block_of == block].sum(0) for block in range(block_of.max() + 1)])


def _improve(
    saliency: Saliency, block_of: npt.NDArray[np.int64], count: int
) -> tuple[float, npt.NDArray[np.int64]]:
    """Return what is kept in the end, and the block of each filter."""
    # Two steps in turns, as in k-means: the best channels for the filters of each block, then the
    # best block for each filter. A block of 2 filters has 2 seats (0 0 1 2 2 for blocks of 2, 1 and
    # 2), and each filter takes one, so that blocks keep their sizes.
    kept_saliency, block_of_seat = -np.inf, np.sort(block_of)
    for _ in range(_ROUNDS):
        block_saliency = _sum_by_block(saliency, block_of)
        kept_channels = np.argsort(-block_saliency, axis=1, kind="stable")[:, :count]
        total = float(np.take_along_axis(block_saliency, kept_channels, 1).sum())
        # neither step makes it worse, so a gain within rounding is none
        if total <= kept_saliency * (1 + 1e-9):
            break
        kept_saliency, best = total, block_of
        # `[outputs, blocks]`: what each filter would keep if it were in each block
        gains = np.stack([saliency[:, channels].sum(1) for channels in kept_channels], axis=1)
        block_of = block_of_seat[linear_sum_assignment(gains[:, block_of_seat], maximize=True)[1]]
    return kept_saliency, best
