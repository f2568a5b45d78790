"""Repair without training: the weights that stay take over from those that went."""

from graphprune.compensation.compensate import (
    Compensation,
    LayerRepair,
    Method,
    compensate_model,
    method_of,
)

__all__ = ["Compensation", "LayerRepair", "Method", "compensate_model", "method_of"]
