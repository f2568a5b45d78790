"""Passes: each rewrites a graph into a smaller or faster one that computes what it promises."""

from graphprune.passes.absorb_constants import AbsorbConstants
from graphprune.passes.compensate import Compensate
from graphprune.passes.eliminate_dead_channels import EliminateDeadChannels
from graphprune.passes.fold_batch_norm import FoldBatchNorm
from graphprune.passes.lower_sparse_connections import LowerSparseConnections
from graphprune.passes.lower_sparse_linear import LowerSparseLinear
from graphprune.passes.lower_sparse_recurrent import LowerSparseRecurrent
from graphprune.passes.remove_identities import RemoveIdentities
from graphprune.passes.slim_channels import SlimChannels
from graphprune.passes.sparse_connections import SparseConnections
from graphprune.passes.sparse_recurrent import SparseRecurrent

__all__ = [
    "AbsorbConstants",
    "Compensate",
    "EliminateDeadChannels",
    "FoldBatchNorm",
    "LowerSparseConnections",
    "LowerSparseLinear",
    "LowerSparseRecurrent",
    "RemoveIdentities",
    "SlimChannels",
    "SparseConnections",
    "SparseRecurrent",
]
