"""A picture of a model's modules and what flows between them, with the groups in each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from graphprune.groups.groups import Dependencies
from graphprune.inspection.network import to_networkx
from graphprune.utils.figures import new_figure, save_figure
from graphprune.utils.html import printable

MOST = 60  # boxes: modules are opened one level after the other while there are no more

# Okabe and Ito's colours, which people tell apart however they see colours; numbers stand beside them.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
DARK = {"#0072b2", "#d55e00", "#009e73"}  # of these, those on which numbers are white


def modules(graph: Dependencies, most: int = MOST) -> nx.DiGraph:
    """Return what flows between modules, opened as deep as gives that many boxes at most.

    Nodes carry `label` and `groups`, the names of the groups whose channels run through them, in order.
    """
    whole = to_networkx(graph)
    paths = (data.get("module", "") for _, data in whole.nodes(data=True))
    best = _at_depth(whole, 1)
    for depth in range(2, 2 + max(path.count(".") for path in paths)):
        found = _at_depth(whole, depth)
        if len(found) > most:
            break
        best = found
    return best


def _at_depth(whole: nx.MultiDiGraph, depth: int) -> nx.DiGraph:
    place: dict[str, str] = {}
    boxes = nx.DiGraph()
    paths = {
        data.get("module", "") for _, data in whole.nodes(data=True) if data["kind"] == "operator"
    }
    with_parts = {path.rpartition(".")[0] for path in paths if path}
    for node, data in whole.nodes(data=True):
        if data["kind"] in ("parameter", "buffer", "constant"):
            continue
        path = data.get("module", "")
        shown = ".".join(path.split(".")[:depth])
        if path and (shown != path or path.count(".") + 1 == depth or path not in with_parts):
            name, key = shown, f"module {shown}"
        else:  # an operator of a module that is opened
            name, key = data["label"].removeprefix("aten."), node
        place[node] = key
        if key not in boxes:
            boxes.add_node(key, label=name, groups={})
        boxes.nodes[key]["groups"] |= dict.fromkeys(filter(None, data["groups"].split(", ")))
    for source, target in whole.edges():
        if source in place and target in place and place[source] != place[target]:
            boxes.add_edge(place[source], place[target])
    return boxes


def draw(graph: Dependencies, path: Path, title: str) -> None:
    """Draw the modules from top to bottom; each group has a colour and a number in all of them."""
    boxes = modules(graph)
    rows = _rows(boxes)
    widest = max(map(len, rows))
    figure = new_figure(max(6.0, 2.6 * widest), max(3.0, 0.85 * len(rows)))
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(_literal(title))
    places = {
        node: ((at + 0.5) / len(row), -level)
        for level, row in enumerate(rows)
        for at, node in enumerate(row)
    }
    numbers = {group.name: number for number, group in enumerate(graph.groups)}
    for source, target in boxes.edges():
        axes.annotate(
            "", places[target], places[source],
            arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 12, "shrinkB": 14},
        )  # fmt: skip
    for node, (x, y) in places.items():
        _box(axes, x, y, boxes.nodes[node], numbers)
    axes.set_xlim(0, 1)
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    save_figure(figure, path)


def _literal(text: str) -> str:
    """Return a text that matplotlib draws as it is, and not as a formula."""
    return printable(text).replace("$", r"\$")


def _rows(boxes: nx.DiGraph) -> list[list[str]]:
    """Return the boxes in rows, each below all that it reads; what goes in circles stands together."""
    circles = nx.condensation(boxes)
    return [
        [node for circle in sorted(row) for node in sorted(circles.nodes[circle]["members"])]
        for row in nx.topological_generations(circles)
    ]


def _box(
    axes: Any, x: float, y: float, data: Mapping[str, Any], numbers: Mapping[str, int]
) -> None:
    axes.text(
        x, y, _literal(data["label"]), ha="center", va="center", fontsize=8, zorder=3,
        bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "#444444"},
    )  # fmt: skip
    shown = [numbers[name] for name in data["groups"]][:6]
    for at, number in enumerate(shown):
        colour = PALETTE[number % len(PALETTE)]
        axes.annotate(
            str(number), (x, y), xytext=(14 * (at - (len(shown) - 1) / 2), -16),
            textcoords="offset points", ha="center", va="center", fontsize=6, zorder=4,
            color="white" if colour in DARK else "black",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": colour, "lw": 0},
        )  # fmt: skip
