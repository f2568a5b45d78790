"""Scoring and repair in several processes: the same result as in one, and a word about one that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.xdist_group("processes")  # that share what a group came to

ROOT = Path(__file__).parents[1]
TIMEOUT = 8


def outcomes(folder: Path, task: str, size: int) -> list[Any]:
    """Return what each process of a group comes to, None for one that does not come to an end."""
    folder = folder / f"{task}-{size}"
    folder.mkdir()
    arguments = [sys.executable, "-m", "tests.ranks", task, str(folder)]
    started = [
        subprocess.Popen(
            [*arguments, str(rank), str(size), str(TIMEOUT if task.startswith("one_") else 120)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=(folder / f"{rank}.log").open("w"),
        )
        for rank in range(size)
    ]
    for process in started:
        process.wait(timeout=300)
    files = [folder / f"{rank}.pt" for rank in range(size)]
    assert any(file.exists() for file in files), (folder / "0.log").read_text()
    return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


def assert_same_scores(mine: Any, its: Any, tolerance: float = 1e-6) -> None:
    """Compare each channel's score, and where it is next to nothing, with the largest of its group."""
    assert mine.keys() == its.keys()
    for name, scores in mine.items():
        scores, others = np.asarray(scores), np.asarray(its[name])
        least = tolerance * 1e-3 * float(np.abs(scores).max())
        np.testing.assert_allclose(others, scores, rtol=tolerance, atol=least, err_msg=name)


def assert_same_tensors(mine: Any, its: Any, tolerance: float = 0.0) -> None:
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(its[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """Return what one process comes to."""
    return outcomes(folder, "everything", 1)[0]


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest, folder: Path) -> list[Any]:
    """Return what each of several processes comes to."""
    return outcomes(folder, "everything", request.param)


def test_several_processes_come_to_what_one_does(alone: Any, group: list[Any]) -> None:
    one, *every = (each["scored_and_repaired"] for each in (alone, *group))
    for its in every:
        assert its["plans"] == one["plans"]
        for criterion, scores in one["scores"].items():
            assert any(np.ptp(np.asarray(values)) > 0 for values in scores.values()), criterion
            assert_same_scores(scores, its["scores"][criterion])
        for name in ("repaired", "tagger"):
            assert_same_tensors(one[name], its[name], 1e-5)
            assert_same_tensors(every[0][name], its[name])
        assert_same_tensors(one["sparse"], its["sparse"])


def test_processes_without_data_of_their_own_do_no_harm(alone: Any, group: list[Any]) -> None:
    one, *every = (each["fewer_batches_than_processes"] for each in (alone, *group))
    for its in every:
        assert its["plan"] == one["plan"]
        assert_same_scores(one["scores"], its["scores"])
        assert_same_scores(one["aside"], its["aside"])
        assert_same_tensors(one["repaired"], its["repaired"], 1e-5)


def test_processes_may_bring_their_own_share(alone: Any, group: list[Any]) -> None:
    one, *every = (each["own_shares"] for each in (alone, *group))
    for its in every:
        for name, tolerance in (
            ("own", 1e-6),
            ("sampled", 1e-3),
        ):  # whose batches hold other samples
            assert its[name]["plan"] == one[name]["plan"]
            assert_same_scores(one[name]["scores"], its[name]["scores"], tolerance)


def test_wrapped_models_are_slimmed_as_the_model_inside(alone: Any, group: list[Any]) -> None:
    one, *every = (each["wrapped"] for each in (alone, *group))
    for its in every:
        for name in ("plain", "ddp", "fsdp"):
            assert_same_tensors(one["plain"], its[name], 1e-5)
        assert its["class"] == ("Net", "Sequential", 0)
        assert its["same_groups"]
        assert its["same_macs"]
        assert its["exported"]
        assert its["sharded"]
        assert its["untouched"]
        for name in ("ddp_output", "fsdp_output"):
            torch.testing.assert_close(its[name], one["output"], rtol=1e-4, atol=1e-5)


def test_the_others_name_a_process_that_was_killed(folder: Path) -> None:
    first, killed, third = outcomes(folder, "one_is_killed", 3)
    assert killed is None
    for kind, text, seconds in (first, third):
        assert kind == "DistributedError"
        assert "rank 1 did not come before its connection broke" in text
        assert seconds < TIMEOUT


def test_the_others_say_what_a_process_raised(folder: Path) -> None:
    first, second, third = outcomes(folder, "one_raises", 3)
    said = "ValueError: the label of sample 17 is missing"
    assert second[0] == "InvalidRequestError"
    assert said in second[1]
    for kind, text, seconds in (first, third):
        assert kind == "DistributedError"
        assert text.startswith("rank 1 failed: ")
        assert said in text
        assert seconds < TIMEOUT


def test_nobody_waits_longer_than_the_time_out(folder: Path) -> None:
    first, late, third = outcomes(folder, "one_does_not_call", 3)
    for kind, text, seconds in (first, third):
        assert kind == "DistributedError"
        assert "rank 1 did not come within 7.2 s" in text
        assert seconds < 1.5 * TIMEOUT
    assert late[0] == "DistributedError"
    assert "gave up: rank 1 did not come within 7.2 s" in late[1]


def test_processes_that_differ_say_so(folder: Path) -> None:
    for told in outcomes(folder, "others_differ", 2):
        data, model = told
        assert "rank 1 came with another first batch of data, or another number" in data
        assert "rank 1 arrived at another plan" in model
