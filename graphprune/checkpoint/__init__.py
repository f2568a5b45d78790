"""Checkpoints shrunk on disk, whatever their size."""

from graphprune.checkpoint.shrink import ShrunkCheckpoint, shrink_checkpoint

__all__ = ["ShrunkCheckpoint", "shrink_checkpoint"]
