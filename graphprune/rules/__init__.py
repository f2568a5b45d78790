"""What each ATen operator does to layouts: a registry, a notation, and a module a family."""

from graphprune.rules import (
    attention,
    contraction,
    factories,
    indexing,
    normalisation,
    pointwise,
    reduction,
    spatial,
    views,
)
from graphprune.rules.pattern import Pattern, pattern
from graphprune.rules.registry import (
    Call,
    Layouts,
    Operator,
    Rule,
    bind_arguments,
    is_in_place,
    register,
    registered,
    rule,
    rule_for,
    tensors_in,
    unregister,
)

__all__ = [
    "Call",
    "Layouts",
    "Operator",
    "Pattern",
    "Rule",
    "attention",
    "bind_arguments",
    "contraction",
    "factories",
    "indexing",
    "is_in_place",
    "normalisation",
    "pattern",
    "pointwise",
    "reduction",
    "register",
    "registered",
    "rule",
    "rule_for",
    "spatial",
    "tensors_in",
    "unregister",
    "views",
]
