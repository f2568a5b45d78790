"""How much each channel matters: a score per slot of each group, the lowest of which goes first."""

from graphprune.importance.magnitude import CRITERIA, Importance, Scores, scores

__all__ = ["CRITERIA", "Importance", "Scores", "scores"]
