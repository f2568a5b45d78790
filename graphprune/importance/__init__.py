"""How much each channel matters: a score per slot of each group, the lowest of which goes first."""

from graphprune.importance.criteria import CRITERIA, Importance, are_losses, scores
from graphprune.importance.scan import Sensitivity, sensitivity
from graphprune.importance.subject import Loss, Scores, Subject

__all__ = [
    "CRITERIA",
    "Importance",
    "Loss",
    "Scores",
    "Sensitivity",
    "Subject",
    "are_losses",
    "scores",
    "sensitivity",
]
