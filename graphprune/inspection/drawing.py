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


def build_module_graph(graph: Dependencies, most: int = MOST) -> nx.DiGraph:
    """Return what flows between modules, opened as deep as gives that many boxes at most.

    Nodes carry `label` and `groups`, the names of the groups whose channels run through them, in order.
    """
    network = to_networkx(graph)
    paths = (data.get("module", "") for _, data in network.nodes(data=True))
    best = _collapse_to_depth(network, 1)
    for depth in range(2, 2 + max((path.count(".") for path in paths), default=0)):
        boxes = _collapse_to_depth(network, depth)
        if len(boxes) > most:
            break
        best = boxes
    return best


def _collapse_to_depth(network: nx.MultiDiGraph, depth: int) -> nx.DiGraph:
    box_by_node: dict[str, str] = {}
    boxes = nx.DiGraph()
    paths = {
        data.get("module", "") for _, data in network.nodes(data=True) if data["kind"] == "operator"
    }
    parent_paths = {path.rpartition(".")[0] for path in paths if path}
    for node, data in network.nodes(data=True):
        if data["kind"] in ("parameter", "buffer", "constant"):
            continue
        # At depth 2 an operator of `encoder.layer.0` is in the box `encoder.layer`; one of `encoder`, which
        # is opened, stands by itself.
        path = data.get("module", "")
        box_path = ".".join(path.split(".")[:depth])
        if path and (box_path != path or path.count(".") + 1 == depth or path not in parent_paths):
            name, key = box_path, f"module {box_path}"
        else:  # an operator of a module that is opened
            name, key = data["label"].removeprefix("aten."), node
        box_by_node[node] = key
        if key not in boxes:
            boxes.add_node(key, label=name, groups={})
        boxes.nodes[key]["groups"] |= dict.fromkeys(filter(None, data["groups"].split(", ")))
    for source, target in network.edges():
        if (
            source in box_by_node
            and target in box_by_node
            and box_by_node[source] != box_by_node[target]
        ):
            boxes.add_edge(box_by_node[source], box_by_node[target])
    return boxes


def draw(graph: Dependencies, path: Path, title: str) -> None:
    """Draw the modules from top to bottom; each group has a colour and a number in all of them."""
    boxes = build_module_graph(graph)
    rows = _rows(boxes)
    widest = max(map(len, rows))
    figure = new_figure(max(6.0, 2.6 * widest), max(3.0, 0.85 * len(rows)))
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(_literal(title))
    positions = {
        node: ((column + 0.5) / len(row), -row_number)
        for row_number, row in enumerate(rows)
        for column, node in enumerate(row)
    }
    numbers = {group.name: number for number, group in enumerate(graph.groups)}
    for source, target in boxes.edges():
        axes.annotate(
            "", positions[target], positions[source],
            arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 12, "shrinkB": 14},
        )  # fmt: skip
    for node, (x, y) in positions.items():
        _draw_box(axes, x, y, boxes.nodes[node], numbers)
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


def _draw_box(
    axes: Any, x: float, y: float, box: Mapping[str, Any], numbers: Mapping[str, int]
) -> None:
    axes.text(
        x, y, _literal(box["label"]), ha="center", va="center", fontsize=8, zorder=3,
        bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "#444444"},
    )  # fmt: skip
    group_numbers = [numbers[name] for name in box["groups"]][:6]
    for position, number in enumerate(group_numbers):
        colour = PALETTE[number % len(PALETTE)]
        axes.annotate(
            str(number), (x, y), xytext=(14 * (position - (len(group_numbers) - 1) / 2), -16),
            textcoords="offset points", ha="center", va="center", fontsize=6, zorder=4,
            color="white" if colour in DARK else "black",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": colour, "lw": 0},
        )  # fmt: skip
