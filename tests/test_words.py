"""Names say what things are: no word that only points, and a verb in front of what acts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import graphprune as gp

ROOT, PASSES = Path(gp.__file__).parent, Path(gp.passes.__file__).parent
TREES = {
    path: ast.parse(path.read_text())
    for folder in (ROOT, PASSES)
    for path in sorted(folder.rglob("*.py"))
}

POINTING = {
    *("asked", "each", "found", "given", "held", "its", "known", "made"),
    *("mine", "one", "own", "place", "rest", "seen", "wanted", "way"),
}
MOST_POINTING = 0.005  # of all bindings

IRREGULAR = (
    "built|done|drawn|found|given|gone|held|kept|known|left|made|met|seen|shown|shrunk|told|written"
)
PARTICIPLES = rf"(?:(?!embed|need|seed|speed)[a-z]{{2,}}ed|{IRREGULAR})"
# Alone, or with where or by whom: `learned`, `left_by`, `compared_on`; `kept_sizes` is a noun.
BARE = re.compile(rf"_?{PARTICIPLES}(?:_(?:at|by|for|from|in|like|of|on|to|with))?")
MOST_BARE = 0.01  # of all functions


def bindings() -> Iterator[str]:
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg


def functions() -> Iterator[tuple[str, bool]]:
    """Yield names of functions with their files, and whether each is a property."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
                yield f"{path.name}:{node.name}", is_property


def test_names_do_not_only_point() -> None:
    names = list(bindings())
    pointing = [name for name in names if name in POINTING]
    assert len(names) > 5_000
    assert len(pointing) <= MOST_POINTING * len(names), sorted(pointing)


def test_what_acts_is_called_by_a_verb() -> None:
    found = list(functions())
    bare = [
        name
        for name, is_property in found
        if not is_property and BARE.fullmatch(name.partition(":")[2])
    ]
    assert len(found) > 1_000
    assert len(bare) <= MOST_BARE * len(found), bare


def test_the_checks_find_what_they_look_for() -> None:
    assert all(map(BARE.fullmatch, ("shrunk", "wired", "_met", "left_by", "wrapped_like")))
    assert not any(map(BARE.fullmatch, ("kept_sizes", "embed", "read", "named_tensors")))
