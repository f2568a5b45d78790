"""Checkpoints shrunk on disk, whatever their size."""

from graphprune.checkpoint.shrink import ShrunkCheckpoint, check_target, shrink_checkpoint

__all__ = ["ShrunkCheckpoint", "check_target", "shrink_checkpoint"]
