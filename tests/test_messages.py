"""Every error and warning that is meant for people: what it says, word for word.

`test_nothing_is_said_that_is_not_here` reads the library's source for places that raise or warn, so a
new message without a case fails.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.errors import GraphPruneError
from tests.message_cases import CASES, Case

for more in sorted(Path(__file__).parent.glob("message_cases_*.py")):  # these add their own
    importlib.import_module(f"tests.{more.stem}")

pytestmark = pytest.mark.xdist_group("messages")  # that share what was heard

ROOT = Path(gp.__file__).parent
INTERNAL = ("layout.py", "kernels.py")  # what they raise is for the library's own code

KINDS = {name for name, value in vars(gp).items() if isinstance(value, type)} | {
    "OtherOperatorsError",
    "not_runnable",
    "_other_shape",
    "self._strayed_to",
    "type(failure)",
}


def places() -> Iterator[tuple[str, int, int]]:
    """Yield file, first and last line of each statement that raises or warns for people."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            said_by = node.exc if isinstance(node, ast.Raise) else node
            if isinstance(said_by, ast.Call):
                kinds = KINDS if isinstance(node, ast.Raise) else {"warn"}
                if ast.unparse(said_by.func) in kinds:
                    yield str(path), node.lineno, node.end_lineno


def line_of(traceback: TracebackType | None) -> tuple[str, int]:
    """Return the innermost place of the library in a traceback."""
    inside = ("", 0)
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if name.startswith(str(ROOT)):
            inside = name, traceback.tb_lineno
        traceback = traceback.tb_next
    return inside


@dataclass
class Heard:
    """What was said, and from where in the library."""

    text: str
    at: tuple[str, int]


def heard(case: Case, folder: Path) -> list[Heard]:
    found: list[Heard] = []

    def warn(message: Any, *rest: Any, **options: Any) -> None:
        frame: FrameType = sys._getframe(2)  # behind errors.warn
        if frame.f_code.co_filename.startswith(str(ROOT)):
            found.append(Heard(str(message), (frame.f_code.co_filename, frame.f_lineno)))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(warnings, "warn", warn)
        torch.manual_seed(0)
        try:
            case.run(folder)
        except GraphPruneError as error:
            cause: BaseException | None = error
            while cause is not None:
                found.append(Heard(str(cause), line_of(cause.__traceback__)))
                cause = cause.__cause__
    return found


@pytest.fixture(scope="module")
def all_heard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Heard]]:
    return {case.name: heard(case, tmp_path_factory.mktemp("case")) for case in CASES}


def test_every_message_says_what_it_should(all_heard: dict[str, list[Heard]]) -> None:
    wrong = {
        case.says: [heard.text for heard in all_heard[case.name]]
        for case in CASES
        if not any(re.fullmatch(case.says, h.text, re.DOTALL) for h in all_heard[case.name])
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_nothing_is_said_that_is_not_here(all_heard: dict[str, list[Heard]]) -> None:
    spoken = [heard.at for every in all_heard.values() for heard in every]
    silent = [
        f"{Path(file).name}:{first}"
        for file, first, last in places()
        if Path(file).name not in INTERNAL
        and not any(file == name and first <= line <= last for name, line in spoken)
    ]
    assert not silent
