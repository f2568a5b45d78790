"""Short training around a cut: a penalty that empties channels before, distillation after."""

from graphprune.training.finetune import Distillation, finetune
from graphprune.training.lasso import GroupLasso

__all__ = ["Distillation", "GroupLasso", "finetune"]
