"""Files that show a dependency graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import networkx as nx

from graphprune.errors import InvalidRequestError
from graphprune.groups import DependencyGraph
from graphprune.importance import Scores
from graphprune.pages import rendered
from graphprune.plan import Plan
from graphprune.view.document import document
from graphprune.view.drawing import draw

_STATIC = {
    "style": "view.css",
    "script": "view.js",
    "dagre": "dagre.min.js",  # of @dagrejs/dagre 3.1.3, which lays graphs out
    "licence": "dagre.LICENSE.txt",
}


def save(
    graph: DependencyGraph, path: Path, title: str, scores: Scores | None, plan: Plan | None
) -> None:
    """Write a dependency graph to a file, as `DependencyGraph.save` says.

    Raises:
        InvalidRequestError: the path ends otherwise, or matplotlib is missing.

    """
    title = title or path.stem

    def write(of: Callable[[dict[str, Any]], str]) -> None:
        path.write_text(of(document(graph, title, scores, plan)), encoding="utf-8")

    writers: dict[str, Callable[[], object]] = {
        ".html": lambda: write(page),
        ".json": lambda: write(json.dumps),
        ".graphml": lambda: nx.write_graphml(graph.to_networkx(), path),
        ".svg": lambda: draw(graph, path, title),
        ".png": lambda: draw(graph, path, title),
    }
    if path.suffix not in writers:
        raise InvalidRequestError(f"{path} must end in {', '.join(writers)}")
    writers[path.suffix]()


def page(found: dict[str, Any]) -> str:
    """Return a document as a page of its own."""
    static = resources.files("graphprune.view") / "static"
    return rendered(
        "graph.html",
        document=found,
        title=found["title"],
        planned=any("kept" in group for group in found["groups"]),
        **{name: (static / file).read_text(encoding="utf-8") for name, file in _STATIC.items()},
    )


def framed(graph: DependencyGraph) -> str:
    """Return the page in a frame that a notebook can hold."""
    source = escape(page(document(graph, "model")), quote=True)
    return f'<iframe srcdoc="{source}" width="100%" height="640" style="border: 0"></iframe>'
