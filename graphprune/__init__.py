"""graphprune: compiler passes that make PyTorch models structurally smaller, and prove it."""

from graphprune import passes  # type: ignore[attr-defined]  # a folder beside this one, which mypy cannot know
from graphprune.calibration.batches import OwnShare
from graphprune.checkpoint import ShrunkCheckpoint, shrink_checkpoint
from graphprune.checkpoint.save import load, save
from graphprune.distributed.wrappers import wrapped_like
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
from graphprune.groups.cost import count_macs, count_parameters
from graphprune.groups.groups import Group
from graphprune.importance import Sensitivity, sensitivity
from graphprune.inspection.dependency_graph import DependencyGraph, analyze
from graphprune.onnx_export.export import Exported, export
from graphprune.pipeline.pipeline import Pass, Pipeline
from graphprune.report.compare import compare
from graphprune.report.comparison import Comparison
from graphprune.report.result import Slimmed
from graphprune.rules import pattern, rule
from graphprune.selection.plan import Plan
from graphprune.slimming.gradual import slim_gradually
from graphprune.slimming.slim import slim, slimmed
from graphprune.slimming.width import width_multiplier
from graphprune.sparsity.connections import (
    DropAndGrow,
    IncrementalConnections,
    connect_sparsely,
    make_permanent,
)
from graphprune.training import Distillation, GradualSparsity, GroupLasso, carry_optimizer, finetune
from graphprune.transformers_config.pretrained import save_pretrained
from graphprune.utils.inputs import Inputs

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
    "passes",
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
