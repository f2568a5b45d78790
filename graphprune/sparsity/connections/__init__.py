"""Sparse connections between filters: which are on, what keeps the others off, and how they grow."""

from graphprune.sparsity.connections.connectivity import (
    Connectivity,
    PatternName,
    choose_connectivity,
)
from graphprune.sparsity.connections.parametrization import (
    ConnectionMask,
    connect_sparsely,
    make_permanent,
    masks_of,
)
from graphprune.sparsity.connections.schedules import DropAndGrow, IncrementalConnections

__all__ = [
    "ConnectionMask",
    "Connectivity",
    "DropAndGrow",
    "IncrementalConnections",
    "PatternName",
    "choose_connectivity",
    "connect_sparsely",
    "make_permanent",
    "masks_of",
]
