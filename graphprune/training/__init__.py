"""Training around a cut: a penalty that empties channels before, distillation and going on after."""

from graphprune.sparsity.gradual import GradualSparsity
from graphprune.training.distillation import Distillation, finetune
from graphprune.training.group_lasso import GroupLasso
from graphprune.training.optimizer import carry_optimizer

__all__ = ["Distillation", "GradualSparsity", "GroupLasso", "carry_optimizer", "finetune"]
