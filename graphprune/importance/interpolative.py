"""A criterion by what a channel says that others do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from graphprune.groups.groups import Scores
from graphprune.importance.context import ScoringContext
from graphprune.importance.layer_statistics import (
    GroupReader,
    collect_group_statistics,
    map_groups_across_ranks,
)


@torch.no_grad()
def interpolative(subject: ScoringContext) -> Scores:
    """Score by what of a channel's values cannot be put together from channels that matter more.

    The most of its own comes first, what it explains is taken from the others, and so on: a QR
    decomposition with column pivoting of the values that layers read.

    Units: share of the squares of all channels of the group. Groups that no convolution or linear
    layer reads are scored by their share of the group's squared weights.

    Source: Chee et al., Model preserving compression for neural networks, section 3 (arXiv 2108.00065).
    """
    statistics = collect_group_statistics(subject)
    return {
        **statistics.unread,
        **dict(map_groups_across_ranks(statistics.places, _score_by_pivoting, subject.data.ranks)),
    }


def _score_by_pivoting(readers: Sequence[GroupReader]) -> npt.NDArray[np.float64]:
    """Return what of each channel's square was left when it was the largest left."""
    count = len(readers[0].features)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for reader in readers:
        # for the feature f of every channel, `[features + 1, features + 1]` -> `[channels, channels]`
        products = torch.stack([reader.squares[f][:, f] for f in reader.features.unbind(1)]).sum(0)
        # over its trace: every layer counts alike, however large its inputs are
        gram += (products / products.trace().clamp_min(torch.finfo(products.dtype).tiny)).cpu()
    scores = np.zeros(count)
    remaining = torch.ones(count, dtype=torch.bool)
    # Cholesky with pivoting of R'R, which the gram matrix is: its rows are those of that R
    squares_left, rows = gram.diagonal().clone(), torch.zeros_like(gram)
    for step in range(count):
        candidates = torch.where(remaining, squares_left, -torch.inf)
        pivot = int(candidates.argmax())
        scores[pivot] = max(float(candidates[pivot]), 0.0) / len(readers)
        remaining[pivot] = False
        if candidates[pivot] > 0:
            earlier = rows[:step]
            rows[step] = (gram[pivot] - earlier[:, pivot] @ earlier) / candidates[pivot].sqrt()
            squares_left -= rows[step].square()
    return scores
