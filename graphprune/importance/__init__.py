"""How much each channel matters: a score per slot of each group, the lowest of which goes first."""

from graphprune.importance.context import Loss, ScoringContext
from graphprune.importance.criteria import (
    CRITERIA,
    LOOK_AT_DATA,
    LOOK_AT_LOSS,
    Importance,
    are_losses,
    scores,
)
from graphprune.importance.losses import check_loss, value_of
from graphprune.importance.sensitivity_scan import Sensitivity, sensitivity

__all__ = [
    "CRITERIA",
    "LOOK_AT_DATA",
    "LOOK_AT_LOSS",
    "Importance",
    "Loss",
    "ScoringContext",
    "Sensitivity",
    "are_losses",
    "check_loss",
    "scores",
    "sensitivity",
    "value_of",
]
