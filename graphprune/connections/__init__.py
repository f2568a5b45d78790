"""Sparse connections between filters: which are on, what keeps the others off, and how they grow."""

from graphprune.connections.masks import (
    ConnectionMask,
    connect_sparsely,
    make_permanent,
    masks_of,
)
from graphprune.connections.schedules import DropAndGrow, IncrementalConnections
from graphprune.connections.wiring import PatternName, Wiring, wired

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
