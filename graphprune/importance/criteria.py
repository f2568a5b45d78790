"""The criteria by name, and scores that channels of all groups can compete by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from graphprune.errors import InvalidRequestError, listed
from graphprune.groups.groups import Group, Scores
from graphprune.importance import magnitude, taylor
from graphprune.importance.context import ScoringContext
from graphprune.importance.diagonal_hessian import taylor2_recursion
from graphprune.importance.hooks import no_hooks_of_gradients
from graphprune.importance.interpolative import interpolative
from graphprune.importance.oracle import oracle
from graphprune.importance.reconstruction import reconstruction

Importance: TypeAlias = str | Callable[[nn.Module, Any], Mapping[str, npt.NDArray[np.float64]]]
"""The name of a criterion, or a function from a model and its `DependencyGraph` to scores."""

CRITERIA: dict[str, Callable[[ScoringContext], Scores]] = {
    "random": magnitude.random,
    "l1": magnitude.l1,
    "l2": magnitude.l2,
    "lamp": magnitude.lamp,
    "bn_scale": magnitude.bn_scale,
    "taylor": taylor.taylor,
    "taylor2": taylor.taylor2,
    "taylor2_recursion": taylor2_recursion,
    "fisher": taylor.fisher,
    "obs": taylor.obs,
    "oracle": oracle,
    "reconstruction": reconstruction,
    "interpolative": interpolative,
}

# Sums over a group's members say nothing of another group, which may have more and larger ones.
_COMPARABLE_WITHIN_GROUP = ("random", "l1", "l2")

# Those that look at data, and of these the ones that look at a loss.
LOOK_AT_DATA = tuple(name for name in CRITERIA if name not in magnitude.BY_WEIGHTS)
LOOK_AT_LOSS = tuple(
    name for name in LOOK_AT_DATA if name not in ("reconstruction", "interpolative")
)

# What a channel's going does to a loss or an error, to be weighed against what it saves.
_LOSSES = (
    "taylor", "taylor2", "taylor2_recursion", "fisher", "obs", "oracle", "reconstruction",
)  # fmt: skip


def are_losses(importance: Importance) -> bool:
    """Say whether the scores of a criterion are amounts of a loss or an error, not ranks.

    A function says so by an attribute of this name.
    """
    return importance in _LOSSES or bool(getattr(importance, "are_losses", False))


def scores(subject: ScoringContext, importance: Importance) -> Scores:
    """Return a score for every slot of every group, higher for slots that matter more.

    Scores of sums of weights, and of functions, are in units of their group's mean; the others are
    in the criterion's own units.

    Args:
        subject: the model, its groups, and data where the criterion looks at data.
        importance: a criterion's name, or a function from model and graph to scores by group.

    Raises:
        InvalidRequestError: there is no such criterion, it lacks weights, data or a loss, or a function
            returned scores that do not fit the groups.

    """
    if isinstance(importance, str):
        if importance not in CRITERIA:
            raise InvalidRequestError(
                f"importance={importance!r} is not a criterion; choose from {', '.join(CRITERIA)}"
            )
        with no_hooks_of_gradients():
            group_scores = CRITERIA[importance](subject)
        if any(np.isnan(values).any() for values in group_scores.values()):
            raise InvalidRequestError(_explain_nan(subject, importance))
        if (
            importance in LOOK_AT_LOSS
            and group_scores
            and not any(s.any() for s in group_scores.values())
        ):
            raise InvalidRequestError(
                f"importance={importance!r} scores every channel 0, so that any could go: on this data the "
                "loss does not change with them (it is at its least, or it counts); pass other data or "
                "another loss"
            )
        if importance not in _COMPARABLE_WITHIN_GROUP:
            return group_scores
    else:
        user_scores = importance(subject.model, subject.graph)
        group_scores = {
            group.name: _check_scores(group, user_scores) for group in subject.graph.groups
        }
        if are_losses(importance):
            return group_scores
    return {name: _divide_by_mean(values) for name, values in group_scores.items()}


def _explain_nan(subject: ScoringContext, importance: str) -> str:
    """Return what to say of scores that are no numbers."""
    names = subject.not_finite()
    if names:
        return f"importance={importance!r} gives no numbers: NaN or infinite numbers in {listed(names)}"
    return (
        f"importance={importance!r} gives no numbers on this data: the loss or its derivatives are not "
        "finite"
    )


def _check_scores(
    group: Group, user_scores: Mapping[str, npt.NDArray[np.float64]]
) -> npt.NDArray[np.float64]:
    values = np.asarray(user_scores.get(group.name, ()), dtype=np.float64)
    if values.shape != (group.size,) or np.isnan(values).any():
        raise InvalidRequestError(
            f"the importance function must give {group.size} numbers for group {group.name!r}, "
            f"not an array of shape {values.shape}{' with NaN' if np.isnan(values).any() else ''}"
        )
    return values


def _divide_by_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return scores in units of their mean, so that groups of different scale can compete."""
    if not values.size:
        return values
    # the mean of signed scores may be near zero or below it, no unit to divide by: then count from the
    # lowest, as in -1 0 4 -> 0 1 5 -> 0 0.5 2.5
    shifted = values - min(0.0, float(values.min()))
    mean = float(shifted.mean())
    return shifted / mean if mean > 0 else np.ones_like(shifted)
