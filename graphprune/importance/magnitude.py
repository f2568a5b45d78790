"""Criteria that look at the parameters alone."""

from __future__ import annotations

from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import ScoringContext
from graphprune.masks import slots_of
from graphprune.utils.progress import track

aten = torch.ops.aten

# The criteria in this file, which can read the weights from files.
BY_WEIGHTS = ("random", "l1", "l2", "lamp", "bn_scale")


def random(subject: ScoringContext) -> Scores:
    """Score by chance: the baseline that every criterion has to beat."""
    return {
        group.name: np.random.default_rng([subject.seed, crc32(group.name.encode())]).random(
            group.size
        )
        for group in subject.graph.groups
    }


def l1(subject: ScoringContext) -> Scores:
    """Score by the sum of absolute weights over all members.

    Source: Li et al., Pruning Filters for Efficient ConvNets, section 3.1 (arXiv 1608.08710), here
    summed over every parameter that the channel runs through.
    """
    return _power_sums(subject, 1)


def l2(subject: ScoringContext) -> Scores:
    """Score by the Euclidean norm of the weights over all members."""
    squares = _power_sums(subject, 2)
    return {name: np.sqrt(values) for name, values in squares.items()}


def lamp(subject: ScoringContext) -> Scores:
    """Score by the square of the weights over that of all channels of the group that are no smaller.

    The strongest channel of each group scores 1, so a global choice leaves at least one of each.

    Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, section 3 (arXiv
    2010.07611), here for whole channels.
    """
    squares = _power_sums(subject, 2)
    return {name: _share_of_larger(values) for name, values in squares.items()}


def bn_scale(subject: ScoringContext) -> Scores:
    """Score by the largest absolute weight of the batch norms that the channel runs through.

    A group that runs through none cannot be scored so: all of its channels score infinity, and stay
    as long as a choice over all groups can take others.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, section
    3 (arXiv 1708.06519).
    """
    weight_names = _batch_norm_weights(subject.graph)
    scores: Scores = {}
    for group in subject.graph.groups:
        norm_weights = [
            np.abs(torch.cat(list(subject.blocks(m.parameter))).double().numpy())
            for m in group.members
            if m.parameter in weight_names and m.layout is group.axis
        ]
        scores[group.name] = (
            np.max(norm_weights, axis=0) if norm_weights else np.full(group.size, np.inf)
        )
    return scores


def _batch_norm_weights(graph: Dependencies) -> set[str]:
    packets = (aten.native_batch_norm, aten.cudnn_batch_norm, aten._native_batch_norm_legit)
    weights = (
        step.arguments.get("weight")
        for step in graph.inference.steps
        if step.func.overloadpacket in packets
    )
    return {v.source for v in weights if v is not None and isinstance(v.source, str)}


def _share_of_larger(squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    order = np.argsort(squares, kind="stable")
    ascending = squares[order]
    # of 1 4 5 the sums 10 9 5: each with all that are no smaller
    tail_sums = np.cumsum(ascending[::-1])[::-1]
    shares = np.empty_like(squares)
    shares[order] = ascending / np.maximum(tail_sums, np.finfo(float).tiny)
    return shares


def _power_sums(subject: ScoringContext, order: Literal[1, 2]) -> Scores:
    """Sum |w|**order of every parameter entry over the slots that the entry belongs to."""
    sums: dict[str, list[npt.NDArray[np.float64]]] = {}
    scores: Scores = {}
    for group in track(subject.graph.groups, "reading weights"):
        scores[group.name] = np.zeros(group.size)
        for member in group.members:
            name = member.parameter
            if name not in subject.graph.inference.trainable:
                continue
            if name not in sums:
                sums[name] = _sums_along(subject, name, order)
            for slots in slots_of(member.layout, group.axis):
                # sums of `[positions]` -> `[slots]`; positions of other groups have slot -1
                in_group = slots >= 0
                scores[group.name] += np.bincount(
                    slots[in_group],
                    weights=sums[name][member.dim][in_group],
                    minlength=group.size,
                )
    return scores


def _sums_along(
    subject: ScoringContext, name: str, order: Literal[1, 2]
) -> list[npt.NDArray[np.float64]]:
    """Return, for each dimension, the sum of |w|**order at each position along it."""
    sums = [np.zeros(size) for size in subject.tensors[name].shape]
    first_row = 0
    for block in subject.blocks(name):
        entries = (block.abs() if block.is_complex() else block).double()
        powers = entries.square() if order == 2 else entries.abs()
        # `[out, in, *window]` -> `[out, in]`, once for both of its channel dimensions
        window_sums = powers.flatten(2).sum(2) if powers.dim() > 2 else powers
        for dim in range(1, powers.dim()):
            sums[dim] += _sum_all_but(window_sums if dim < 2 else powers, dim).numpy()
        sums[0][first_row : first_row + len(block)] = _sum_all_but(window_sums, 0).numpy()
        first_row += len(block)
    return sums


def _sum_all_but(powers: Tensor, dim: int) -> Tensor:
    other_dims = [i for i in range(powers.dim()) if i != dim]
    return powers.sum(other_dims) if other_dims else powers
