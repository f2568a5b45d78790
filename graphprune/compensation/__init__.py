"""Repair without training: the weights that stay take over from those that went."""

from graphprune.compensation.compensate import (
    Compensation,
    Method,
    Repaired,
    compensated,
    method_of,
)

__all__ = ["Compensation", "Method", "Repaired", "compensated", "method_of"]
