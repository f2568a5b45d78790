"""Files are whole or not there, whoever kills, fills or plants what; JSON of others is read or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.importance.sensitivity_scan import Sensitivity
from graphprune.report.comparison import Comparison, ModelMeasurement
from graphprune.utils.atomic_files import (
    check_target_path,
    draft_file,
    draft_folder,
    open_atomically,
    try_lock,
    write_text,
)

X = torch.ones(2, 6)
NOTHING = ModelMeasurement(0, 0, None, {})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


WRITERS: dict[str, Callable[[gp.Slimmed, Path], object]] = {
    "plan.json": lambda result, path: result.plan.save(path),
    "slim.safetensors": gp.save,
    "report.html": lambda result, path: result.report(path),
    "comparison.html": lambda _, path: Comparison(NOTHING, NOTHING, "", 1, {}, {}).save(path),
    "comparison.json": lambda _, path: Comparison(NOTHING, NOTHING, "", 1, {}, {}).save(path),
    "scan.svg": lambda _, path: Sensitivity((0.5,), 0.0, {"a": [1.0]}, {"a": [0]}).plot(path),
    **{
        f"graph{suffix}": lambda result, path: result.graph.save(path)
        for suffix in (".html", ".json", ".graphml", ".svg", ".png")
    },
}


@pytest.fixture(scope="module")
def result() -> gp.Slimmed:
    return gp.slimmed(net(), 0.5, X)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    name: str, result: gp.Slimmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text("the old file")

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        WRITERS[name](result, path)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_a_new_file_has_the_mode_of_any_and_an_old_one_keeps_its_own(
    name: str, result: gp.Slimmed, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        WRITERS[name](result, tmp_path / name)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    (tmp_path / name).chmod(0o604)
    WRITERS[name](result, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o604
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_there_is_not_is_refused(
    name: str, result: gp.Slimmed, tmp_path: Path
) -> None:
    with pytest.raises(gp.InvalidRequestError, match=rf"no folder .*missing for {name}; make it"):
        WRITERS[name](result, tmp_path / "missing" / name)
    (tmp_path / name).mkdir()
    with pytest.raises(gp.InvalidRequestError, match="is a folder; name a file in it"):
        WRITERS[name](result, tmp_path / name)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, SystemExit])
def test_whatever_interrupts_a_writer_what_it_wrote_is_gone(
    failure: type[BaseException], tmp_path: Path
) -> None:
    def interrupted() -> None:
        with open_atomically(tmp_path / "file") as file:
            file.write(b"half")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_file_is_replaced_and_a_device_written_to(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"
    write_text("/dev/null", "new")
    assert not Path("/dev/null").is_file()


def test_drafts_have_names_that_nobody_knows_and_that_systems_take(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with draft_file(tmp_path / ("\N{GRINNING FACE}" * 60)) as draft:
            names.add(draft.name)
    assert len(names) == 3
    assert [len(os.fsencode(path.name)) for path in tmp_path.iterdir()] == [240]


def test_letters_that_no_file_can_hold_are_spelt(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "a\udc80b\N{SNOWMAN}")
    assert (tmp_path / "file").read_text("utf-8") == r"a\udc80b" + "\N{SNOWMAN}"


KILLED = """
import sys
from pathlib import Path
sys.modules["graphprune"] = type(sys)("graphprune")  # without torch, which takes seconds
sys.modules["graphprune"].__path__ = [sys.argv[1]]
from graphprune.utils.atomic_files import write_text
for letter in range(1_000_000):
    write_text(sys.argv[2], chr(97 + letter % 26) * 300_000)
    print(flush=True)
"""


IN_TURNS = """
import os, random, sys, time
from pathlib import Path
sys.modules["graphprune"] = type(sys)("graphprune")  # without torch, which takes seconds
sys.modules["graphprune"].__path__ = [sys.argv[1]]
from graphprune.utils.atomic_files import try_lock
folder = Path(sys.argv[2])
for _ in range(200):
    with try_lock(folder / "lock", wait=60) as has_lock:
        assert has_lock
        os.close(os.open(folder / "held", os.O_CREAT | os.O_EXCL))  # fails where another holds it too
        time.sleep(random.random() * 0.0005)
        os.unlink(folder / "held")
"""


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    words = [sys.executable, "-c", IN_TURNS, str(Path(gp.__file__).parent), str(tmp_path)]
    processes = [subprocess.Popen(words) for _ in range(6)]
    codes = [process.wait() for process in processes]
    assert not any(codes)


def killed_while_writing(path: Path, tries: int) -> None:
    words = [sys.executable, "-c", KILLED, str(Path(gp.__file__).parent), str(path)]
    for number in range(tries):
        with subprocess.Popen(words, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()  # it has begun
            time.sleep(0.002 * number)
            writer.send_signal(signal.SIGKILL)
        text = path.read_text()
        assert text == text[0] * 300_000


def test_killed_writers_leave_a_whole_file(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "file", 3)


@pytest.mark.sweep
def test_writers_killed_at_many_moments_leave_a_whole_file(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "file", 60)


def test_a_folder_is_written_in_one_go(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with draft_folder(folder) as draft:
        for name in ("config.json", "a.safetensors", "b.safetensors"):
            (draft / name).write_text("old")

    def interrupted() -> None:
        with draft_folder(folder) as draft:
            (draft / "config.json").write_text("new")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        interrupted()
    assert {path.read_text() for path in folder.iterdir()} == {"old"}
    with draft_folder(folder, ["*.safetensors"], last="config.json") as draft:
        (draft / "config.json").write_text("new")
        (draft / "a.safetensors").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.json": "new",
        "a.safetensors": "new",
    }


def test_a_lock_is_given_back_by_the_dead(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holds = "import filelock as f, sys; a = f.FileLock(sys.argv[1]); a.acquire(); print(flush=1); input()"
    words = [sys.executable, "-c", holds, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with try_lock(lock) as first:
            assert not first
        other.kill()
    with try_lock(lock) as first:
        assert first


@pytest.mark.parametrize("suffix", [".pt", "", ".SAFETENSORS"])
def test_a_model_is_saved_under_an_ending_that_says_so(
    suffix: str, result: gp.Slimmed, tmp_path: Path
) -> None:
    with pytest.raises(gp.InvalidRequestError, match=r"must end in \.safetensors"):
        gp.save(result, tmp_path / f"slim{suffix}")
    with pytest.raises(gp.InvalidRequestError, match=r"must end in \.onnx"):
        gp.export(result.model, X, tmp_path / f"slim{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_choice_of_endings_is_said() -> None:
    with pytest.raises(gp.InvalidRequestError, match=r"a\.b must end in \.c, \.d or \.e"):
        check_target_path("a.b", ".c", ".d", ".e")


# ------------------------------------------------------------------------------------------- JSON

HOSTILE = [
    "", "{", "[]", "null", "3", "[" * 100_000, '{"a":' * 100_000, "9" * 4_000, "Infinity", "NaN", "1e999",
    '{"a": Infinity}', '{"a": -Infinity}', "\x00", '"\ud800', '{"format": []}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_json_is_refused_by_each_reader(text: str, tmp_path: Path) -> None:
    path = tmp_path / "graphprune.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(gp.PlanError, match="is not a plan that graphprune saved"):
        gp.Plan.load(path)
    with pytest.raises(gp.InvalidRequestError, match=r"is no file that graphprune\.shrink_check"):
        gp.load(tmp_path, net(), X)
    (tmp_path / "model.safetensors.index.json").write_bytes(path.read_bytes())
    with pytest.raises(gp.InvalidRequestError, match="is no index of a checkpoint"):
        gp.shrink_checkpoint(net().to("meta"), gp.Plan({}, {}), tmp_path, tmp_path / "out", X)


def plan_text(size: Any = 8, keep: Any = (0, 3), **others: Any) -> str:
    content = {"format": "graphprune-plan", "version": 1, "request": {}}
    content |= {"groups": {"0.weight:0": {"size": size, "keep": keep}}} | others
    return json.dumps(content)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "8"}, {"size": 8.9}, {"size": True}, {"size": None}, {"size": float("inf")},
        {"size": 10**30}, {"keep": ["1"]}, {"keep": [0.5]}, {"keep": [True]}, {"keep": [float("inf")]},
        {"keep": 3}, {"keep": {}}, {"keep": []}, {"keep": [3, 0]}, {"keep": [8]}, {"groups": [1]},
        {"groups": None}, {"groups": {"a": 1}}, {"request": None}, {"version": True}, {"version": 1.5},
    ],
)  # fmt: skip
def test_a_plan_of_other_kinds_of_values_is_refused(wrong: Any, tmp_path: Path) -> None:
    assert gp.Plan.from_json(plan_text()).keep == {"0.weight:0": [0, 3]}
    (tmp_path / "plan.json").write_text(plan_text(**wrong))
    with pytest.raises(gp.PlanError, match="is not a plan that graphprune saved"):
        gp.Plan.load(tmp_path / "plan.json")
