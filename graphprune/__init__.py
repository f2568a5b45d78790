"""graphprune: compiler passes that make PyTorch models structurally smaller, and prove it."""

from graphprune.calibration import OwnShare
from graphprune.checkpoint import ShrunkCheckpoint, shrink_checkpoint
from graphprune.compare import compare
from graphprune.comparison import Comparison
from graphprune.connections import (
    DropAndGrow,
    IncrementalConnections,
    connect_sparsely,
    make_permanent,
)
from graphprune.cost import count_macs, count_parameters
from graphprune.errors import (
    CaptureError,
    DistributedError,
    ExportError,
    GraphPruneError,
    GraphPruneWarning,
    InvalidRequestError,
    PlanError,
    VerificationError,
)
from graphprune.forms import Slimmed
from graphprune.gradually import slim_gradually
from graphprune.groups import DependencyGraph, Group, analyze
from graphprune.importance import Sensitivity, sensitivity
from graphprune.inputs import Inputs
from graphprune.onnx import Exported, export
from graphprune.pipeline import Pass, Pipeline
from graphprune.plan import Plan
from graphprune.pretrained import save_pretrained
from graphprune.rules import pattern, rule
from graphprune.saving import load, save
from graphprune.slim import slim, slimmed
from graphprune.training import Distillation, GradualSparsity, GroupLasso, carry_optimizer, finetune
from graphprune.width import width_multiplier
from graphprune.wrappers import wrapped_like

__all__ = [
    "CaptureError",
    "Comparison",
    "DependencyGraph",
    "Distillation",
    "DistributedError",
    "DropAndGrow",
    "ExportError",
    "Exported",
    "GradualSparsity",
    "GraphPruneError",
    "GraphPruneWarning",
    "Group",
    "GroupLasso",
    "IncrementalConnections",
    "Inputs",
    "InvalidRequestError",
    "OwnShare",
    "Pass",
    "Pipeline",
    "Plan",
    "PlanError",
    "Sensitivity",
    "ShrunkCheckpoint",
    "Slimmed",
    "VerificationError",
    "analyze",
    "carry_optimizer",
    "compare",
    "connect_sparsely",
    "count_macs",
    "count_parameters",
    "export",
    "finetune",
    "load",
    "make_permanent",
    "pattern",
    "rule",
    "save",
    "save_pretrained",
    "sensitivity",
    "shrink_checkpoint",
    "slim",
    "slim_gradually",
    "slimmed",
    "width_multiplier",
    "wrapped_like",
]
