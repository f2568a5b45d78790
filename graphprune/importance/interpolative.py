"""A criterion by what a channel says that others do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from graphprune.groups.groups import Scores
from graphprune.importance.context import Subject
from graphprune.importance.layer_statistics import Place, shared_out, surroundings


@torch.no_grad()
def interpolative(subject: Subject) -> Scores:
    """Score by what of a channel's values cannot be put together from channels that matter more.

    The most of its own comes first, what it explains is taken from the others, and so on: a QR
    decomposition with column pivoting of the values that layers read.

    Units: share of the squares of all channels of the group. Groups that no convolution or linear
    layer reads are scored by their share of the group's squared weights.

    Source: Chee et al., Model preserving compression for neural networks, section 3 (arXiv 2108.00065).
    """
    found = surroundings(subject)
    return {**found.unread, **dict(shared_out(found.places, _pivoted, subject.data.ranks))}


def _pivoted(places: Sequence[Place]) -> npt.NDArray[np.float64]:
    """Return what of each channel's square was left when it was the largest left."""
    count = len(places[0].features)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for place in places:
        own = torch.stack([place.squares[f][:, f] for f in place.features.unbind(1)]).sum(0)
        gram += (own / own.trace().clamp_min(torch.finfo(own.dtype).tiny)).cpu()
    scores = np.zeros(count)
    left = torch.ones(count, dtype=torch.bool)
    own, explained = gram.diagonal().clone(), torch.zeros_like(gram)
    for step in range(count):
        rest = torch.where(left, own, -torch.inf)
        first = int(rest.argmax())
        scores[first] = max(float(rest[first]), 0.0) / len(places)
        left[first] = False
        if rest[first] > 0:
            known = explained[:step]
            explained[step] = (gram[first] - known[:, first] @ known) / rest[first].sqrt()
            own -= explained[step].square()
    return scores
