"""Files that show a dependency graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import networkx as nx

from graphprune.groups.groups import Dependencies, Scores
from graphprune.inspection.document import build_document
from graphprune.inspection.drawing import draw
from graphprune.inspection.network import to_networkx
from graphprune.selection.plan import Plan
from graphprune.utils.atomic_files import check_target_path, write_text
from graphprune.utils.html import printable, render_template

SUFFIXES = (".html", ".json", ".graphml", ".svg", ".png")


def save(
    graph: Dependencies, path: Path, title: str, scores: Scores | None, plan: Plan | None
) -> None:
    """Write a dependency graph to a file, as `DependencyGraph.save` says.

    Raises:
        InvalidRequestError: the path ends otherwise or is in no folder, or matplotlib is missing.

    """
    check_target_path(path, *SUFFIXES)
    title = title or path.stem

    def write(serialize: Callable[[dict[str, Any]], str]) -> None:
        write_text(path, serialize(build_document(graph, title, scores, plan)))

    writers: dict[str, Callable[[], object]] = {
        ".html": lambda: write(render_page),
        ".json": lambda: write(json.dumps),
        ".graphml": lambda: write_text(path, to_graphml(graph)),
        ".svg": lambda: draw(graph, path, title),
        ".png": lambda: draw(graph, path, title),
    }
    writers[path.suffix]()


def to_graphml(graph: Dependencies) -> str:
    """Return a dependency graph as GraphML; letters that XML has not are spelt as Python does."""
    network = to_networkx(graph)
    printable_network = nx.relabel_nodes(network, {node: printable(node) for node in network})
    # These are the graph's own dicts of attributes, so that what is put in them is put in the graph.
    for attributes in (
        *dict(printable_network.nodes(data=True)).values(),
        *(d for *_, d in printable_network.edges(data=True)),
    ):
        for name, value in attributes.items():
            attributes[name] = printable(value) if isinstance(value, str) else value
    return "\n".join(nx.generate_graphml(printable_network)) + "\n"


def render_page(contents: dict[str, Any]) -> str:
    """Return a document as a page of its own."""
    contents = _make_printable(contents)
    return render_template(
        "graph.html",
        read_scripts(),
        document=contents,
        title=contents["title"],
        planned=any("kept" in group for group in contents["groups"]),
        style=_read_static("view.css"),
    )


def read_scripts() -> list[str]:
    """Return what runs on the page: @dagrejs/dagre 3.1.3, which lays graphs out, and the package's own."""
    dagre = f"/*\n{_read_static('dagre.LICENSE.txt')}*/\n{_read_static('dagre.min.js')}"
    return [dagre, _read_static("view.js")]


def _read_static(name: str) -> str:
    return (resources.files("graphprune.inspection") / "static" / name).read_text(encoding="utf-8")


def _make_printable(value: Any) -> Any:
    """Return a document whose texts are the same in a page's data and in its elements."""
    if isinstance(value, dict):
        return {printable(str(name)): _make_printable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_printable(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def render_frame(graph: Dependencies) -> str:
    """Return the page in a frame that a notebook can hold."""
    source = escape(render_page(build_document(graph, "model")), quote=True)
    return (
        f'<iframe srcdoc="{source}" sandbox="allow-scripts" width="100%" height="640" '
        'style="border: 0"></iframe>'
    )
