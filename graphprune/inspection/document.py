"""A dependency graph in plain types: what every picture of it is drawn from.

The document is what `networkx.node_link_data` makes of `DependencyGraph.to_networkx()`, and beside its
"nodes" and "edges":

- "groups": of channels, each with `name`, `size`, `exact`, `inner`, `renormalised` (operators), `members`
  (`parameter`, `dim`, `layout` in words), `options` (numbers of channels that `slim` may keep) and, where
  given, `scores` (importances) and `kept` (channels that a plan keeps, by number).
- "tensors": parameters and buffers, each with `name`, `trainable`, `dims` (sizes), `layout` (a text a
  dimension), `fixed` (by dimension, why nothing can be cut).
- "macs": by the id of an operator, a list of products, each a list of sizes.
- "seconds": by module, what its operators took before and after, where that was measured.
- "unknown": operators without a rule.
- "title" of the model, "schema", which names this description (`SCHEMA`), and "graphprune", the version
  that wrote it.

A size is a number, the name of a group (how many channels it keeps), `{"times": [size, ...]}` or
`{"plus": [size, ...]}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeAlias

import networkx as nx

from graphprune.groups.cost import mac_terms
from graphprune.groups.groups import Dependencies, Group, Scores
from graphprune.inspection.network import operator_id, to_networkx
from graphprune.layout import (
    Axis,
    Layout,
    Product,
    describe,
    free_axes,
    parts_of,
    resolve,
    size_of,
    why_fixed,
)
from graphprune.selection.allocation import allowed_sizes
from graphprune.selection.plan import Plan

SCHEMA = "graphprune/graph/1"

Size: TypeAlias = int | str | dict[str, list[Any]]


def build_document(
    graph: Dependencies,
    title: str = "",
    scores: Scores | None = None,
    plan: Plan | None = None,
    seconds: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return a dependency graph in plain types, as this module describes.

    Args:
        graph: made by `analyze`.
        title: what to call the model.
        scores: by group, the importance of each channel.
        plan: what is kept.
        seconds: by module, what its operators took before and after.

    """
    groups = [_group(graph, group, graph.names) for group in graph.groups]
    for group in groups:
        name = group["name"]
        if scores is not None and name in scores:
            group["scores"] = [float(score) for score in scores[name]]
        if plan is not None and name in plan.keep:
            group["kept"] = list(plan.keep[name])
    contents = {"schema": SCHEMA, "graphprune": version("graphprune"), "title": title}
    macs = {
        operator_id(number): [
            [_size(dim, graph.names) for dim in product] for product in mac_terms(step)
        ]
        for number, step in enumerate(graph.inference.steps)
    }
    contents |= nx.node_link_data(to_networkx(graph), edges="edges")
    return contents | {
        "groups": groups,
        "tensors": [
            _tensor(graph, name, layouts, graph.names)
            for name, layouts in graph.inference.parameters.items()
        ],
        "macs": {operator: products for operator, products in macs.items() if products},
        "seconds": {module: list(pair) for module, pair in (seconds or {}).items()},
        "unknown": [str(unknown_operator) for unknown_operator in graph.unknown],
    }


def _group(graph: Dependencies, group: Group, names: Mapping[Axis, str]) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "exact": group.exact,
        "inner": group.inner,
        "renormalised": [str(reason) for reason in group.renormalised],
        "members": [
            {
                "parameter": member.parameter,
                "dim": member.dim,
                "layout": describe(member.layout, names),
            }
            for member in group.members
        ],
        "options": allowed_sizes(graph, group, "auto"),
    }


def _tensor(
    graph: Dependencies, name: str, layouts: list[Layout], names: Mapping[Axis, str]
) -> dict[str, Any]:
    fixed = {
        dim: str(reason)
        for dim, layout in enumerate(layouts)
        if (reason := why_fixed(layout)) is not None and not free_axes(layout)
    }
    return {
        "name": name,
        "trainable": name in graph.inference.trainable,
        "dims": [_size(layout, names) for layout in layouts],
        "layout": [describe(layout, names) for layout in layouts],
        "fixed": {str(dim): why for dim, why in fixed.items()},
    }


def _size(layout: Layout, names: Mapping[Axis, str]) -> Size:
    """Return how many slots a dimension has, as a function of what groups keep."""
    # `(heads dim)`, of which only the 12 heads can go, is {"times": ["q_proj.weight:0", 64]}.
    layout = resolve(layout)
    if not any(axis in names for axis in free_axes(layout)):
        return size_of(layout)
    if isinstance(layout, Axis):
        return names[layout]
    parts = [_size(part, names) for part in parts_of(layout)]
    return {"times" if isinstance(layout, Product) else "plus": parts}
