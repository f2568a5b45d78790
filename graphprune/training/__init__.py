"""Training around a cut: a penalty that empties channels before, distillation and going on after."""

from graphprune.training.finetune import Distillation, finetune
from graphprune.training.gradual_sparsity import GradualSparsity
from graphprune.training.lasso import GroupLasso
from graphprune.training.optimizer import carry_optimizer

__all__ = ["Distillation", "GradualSparsity", "GroupLasso", "carry_optimizer", "finetune"]
