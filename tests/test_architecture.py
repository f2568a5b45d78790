"""The plan of the house: what each room may know, from the ground up. Lazy imports count too."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import graphprune as gp

ROOT = Path(gp.__file__).parent
PASSES = Path(gp.passes.__file__).parent

# A room imports only from the floors below its own; rooms of one floor do not know each other.
FLOORS = [
    {"errors", "layout"},
    {"masks", "rules", "utils", "distributed"},
    {"inference", "calibration", "ops"},
    {"capture", "graph_utils", "groups", "onnx_export", "shrink"},
    {"importance", "selection", "pipeline", "verify"},
    {"compensation", "inspection", "runtime", "sparsity"},
    {"report"},
    {"transformers_config", "training"},
    {"slimming"},
    {"checkpoint", "passes"},
    {"__init__"},
    {"demo"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES_AT_THE_ROOT = 8


def modules() -> dict[str, Path]:
    """Return the files of the library by dotted name, without "graphprune" in front."""
    files = {}
    for folder, prefix in ((ROOT, ()), (PASSES, ("passes",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            inner = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join(inner) or "__init__"] = path
    return files


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what of the library a file imports, anywhere in it, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "graphprune":
                inner = name.removeprefix("graphprune").removeprefix(".")
                module = inner if inner in MODULES else inner.rpartition(".")[0]
                yield module if module in MODULES else "__init__", node.lineno


def arrows() -> Iterator[tuple[str, str, int]]:
    for name, path in MODULES.items():
        for other, line in imported(ast.parse(path.read_text())):
            if other != name:
                yield name, other, line


def test_every_arrow_between_rooms_points_down() -> None:
    upwards = [
        f"{MODULES[name].relative_to(ROOT.parent)}:{line} ({name}) imports {other}"
        for name, other, line in arrows()
        if name.split(".")[0] != other.split(".")[0]
        and FLOOR_OF[name.split(".")[0]] <= FLOOR_OF[other.split(".")[0]]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = nx.DiGraph((name, other) for name, other, _ in arrows())
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph)]
    assert not [circle for circle in circles if len(circle) > 1]


def test_the_plan_names_every_room_and_the_root_is_not_a_shed() -> None:
    assert {name.split(".")[0] for name in MODULES} == FLOOR_OF.keys()
    assert len(list(ROOT.glob("*.py"))) <= FILES_AT_THE_ROOT


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from graphprune.layout import Axis", "layout"),
        ("import graphprune.rules.views", "rules.views"),
        ("from graphprune.rules import views", "rules.views"),
        ("def late():\n    from graphprune.verify import verify", "verify"),
        ("import graphprune", "__init__"),
        ("from graphprune import slim", "__init__"),
    ],
)
def test_every_way_of_importing_is_seen(code: str, found: str) -> None:
    assert [name for name, _ in imported(ast.parse(code))] == [found]


def test_every_package_is_installed() -> None:
    packages = {
        ".".join(("graphprune", *path.parent.relative_to(ROOT).parts))
        for path in ROOT.rglob("__init__.py")
    }
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == packages | {"graphprune.passes"}
