"""Passes: each rewrites a graph into a smaller or faster one that computes what it promises."""

from graphprune.passes.compensate import Compensate
from graphprune.passes.slim_channels import SlimChannels

__all__ = ["Compensate", "SlimChannels"]
