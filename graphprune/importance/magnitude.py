"""Criteria that look at the parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError
from graphprune.groups import DependencyGraph, Group
from graphprune.layout import slots_of
from graphprune.state import named_tensors

Scores: TypeAlias = dict[str, npt.NDArray[np.float64]]
"""By group name, one score a slot."""

Importance: TypeAlias = (
    str | Callable[[nn.Module, DependencyGraph], Mapping[str, npt.NDArray[np.float64]]]
)
"""The name of a criterion, or a function from a model and its graph to scores."""


def _random(model: nn.Module, graph: DependencyGraph, seed: int) -> Scores:
    """Score by chance: the baseline that every criterion has to beat."""
    return {
        group.name: np.random.default_rng([seed, crc32(group.name.encode())]).random(group.size)
        for group in graph.groups
    }


def _l1(model: nn.Module, graph: DependencyGraph, seed: int) -> Scores:
    """Score by the sum of absolute weights over all members.

    Source: Li et al., Pruning Filters for Efficient ConvNets, section 3.1 (arXiv 1608.08710), here
    summed over every parameter that the channel runs through.
    """
    return _power_sums(model, graph, 1)


def _l2(model: nn.Module, graph: DependencyGraph, seed: int) -> Scores:
    """Score by the Euclidean norm of the weights over all members."""
    squares = _power_sums(model, graph, 2)
    return {name: np.sqrt(values) for name, values in squares.items()}


CRITERIA: dict[str, Callable[[nn.Module, DependencyGraph, int], Scores]] = {
    "random": _random,
    "l1": _l1,
    "l2": _l2,
}


def scores(
    model: nn.Module, graph: DependencyGraph, importance: Importance, seed: int = 0
) -> Scores:
    """Return a score for every slot of every group, higher for slots that matter more.

    Args:
        model: holds the weights.
        graph: the groups to score.
        importance: "random", "l1", "l2", or a function from model and graph to scores by group.
        seed: for "random".

    Raises:
        InvalidRequestError: there is no such criterion, it needs weights and the model has none, or
            a function returned scores that do not fit the groups.

    """
    if isinstance(importance, str):
        if importance not in CRITERIA:
            raise InvalidRequestError(
                f"importance={importance!r} is not a criterion; choose from {', '.join(sorted(CRITERIA))}"
            )
        return CRITERIA[importance](model, graph, seed)
    given = importance(model, graph)
    return {group.name: _checked(group, given) for group in graph.groups}


def _checked(group: Group, given: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    values = np.asarray(given.get(group.name, ()), dtype=np.float64)
    if values.shape != (group.size,) or np.isnan(values).any():
        raise InvalidRequestError(
            f"the importance function must give {group.size} numbers for group {group.name!r}, "
            f"not an array of shape {values.shape}{' with NaN' if np.isnan(values).any() else ''}"
        )
    return values


def _power_sums(model: nn.Module, graph: DependencyGraph, order: Literal[1, 2]) -> Scores:
    """Sum |w|**order of every parameter entry over the slots that the entry belongs to."""
    tensors = named_tensors(model)
    sums: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
    result: Scores = {}
    for group in graph.groups:
        result[group.name] = np.zeros(group.size)
        for member in group.members:
            name, dim = member.parameter, member.dim
            if name not in graph.inference.trainable:
                continue
            if (name, dim) not in sums:
                sums.update(_sums_along(name, tensors[name], order))
            for slots in slots_of(member.layout, group.axis):
                inside = slots >= 0
                result[group.name] += np.bincount(
                    slots[inside], weights=sums[name, dim][inside], minlength=group.size
                )
    return result


def _sums_along(
    name: str, tensor: Tensor, order: Literal[1, 2]
) -> dict[tuple[str, int], npt.NDArray[np.float64]]:
    """Return, for each dimension, the sum of |w|**order at each position along it."""
    if tensor.is_meta:
        raise InvalidRequestError(
            f"{name} is on the meta device and has no values to score; use importance='random' or a "
            "function, or load the weights first"
        )
    entries = tensor.detach()
    entries = (entries.abs() if entries.is_complex() else entries).float()
    powers = entries.square() if order == 2 else entries.abs()
    windows = (
        powers.flatten(2).sum(2) if powers.dim() > 2 else powers
    )  # once for channels in and out
    return {
        (name, dim): _sums(windows if dim < 2 else powers, dim).double().cpu().numpy()
        for dim in range(powers.dim())
    }


def _sums(powers: Tensor, dim: int) -> Tensor:
    others = [i for i in range(powers.dim()) if i != dim]
    return powers.sum(others) if others else powers
