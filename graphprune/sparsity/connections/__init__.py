"""Sparse connections between filters: which are on, what keeps the others off, and how they grow."""

from graphprune.sparsity.connections.connectivity import PatternName, Wiring, wired
from graphprune.sparsity.connections.parametrization import (
    ConnectionMask,
    connect_sparsely,
    make_permanent,
    masks_of,
)
from graphprune.sparsity.connections.schedules import DropAndGrow, IncrementalConnections

__all__ = [
    "ConnectionMask",
    "DropAndGrow",
    "IncrementalConnections",
    "PatternName",
    "Wiring",
    "connect_sparsely",
    "make_permanent",
    "masks_of",
    "wired",
]
