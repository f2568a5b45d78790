"""What is said of files, and of mistakes on the command line; see message_cases.py."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import graphprune as gp
from graphprune import cli
from graphprune.importance.sensitivity_scan import _scans
from graphprune.utils.atomic_files import check_target_path, try_lock
from tests.message_cases import X, case, net, said
from tests.message_cases_checkpoints import shrunk, written


@case(r"slim\.pt must end in \.safetensors")
def saved_under_another_ending(folder: Path) -> None:
    gp.save(gp.slimmed(net(), 0.5, X), "slim.pt")


@case(r".* is a folder; name a file in it")
def a_folder_for_a_file(folder: Path) -> None:
    check_target_path(folder)


said(
    "there is no folder missing for plan.json; make it first",
    lambda: check_target_path("missing/plan.json"),
)


@case(r".* cannot be written to; name another folder")
def a_folder_that_is_not_ones_own(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "access", lambda *_: False)
        check_target_path(folder / "plan.json")


# -------------------------------------------------------------------------------------- checkpoints


@case(r".*target is a file; name a folder for the slim checkpoint")
def a_file_for_a_checkpoint(folder: Path) -> None:
    (folder / "target").write_text("")
    shrunk(written(folder), folder / "target")


@case("another process is writing to .*; wait for it, or name another folder")
def two_processes(folder: Path) -> None:
    (folder / "target").mkdir()
    with try_lock(folder / "target" / ".graphprune.lock"):
        shrunk(written(folder), folder / "target")


@case(
    r"notes\.txt in .* links to a file outside of it, and was not copied to .*target; copy what you need"
)
def a_link_to_elsewhere(folder: Path) -> None:
    (folder / "elsewhere").write_text("secret")
    source = folder / "source"
    source.mkdir()
    save_file(net().state_dict(), source / "model.safetensors")
    (source / "notes.txt").symlink_to(folder / "elsewhere")
    shrunk(source, folder / "target")


@case(
    r".*scan\.json is not a cache of sensitivity scans: what it says of 'a' is no list of losses; name .*"
)
def a_cache_of_no_losses(folder: Path) -> None:
    (folder / "scan.json").write_text('{"sensitivity": {"": {"a": "b"}}}')
    _scans(folder / "scan.json")


# ---------------------------------------------------------------------------------------- pipelines

said(
    "passes='fold-batch-norm' is a text; Pipeline.parse makes a pipeline of one",
    lambda: gp.Pipeline("fold-batch-norm"),
)
said(
    r"'fold-batch-norm' is no pass: a pipeline is of objects such as SlimChannels\(ratio=0\.5\), and "
    r"Pipeline\.parse reads a text of their names",
    lambda: gp.Pipeline(["fold-batch-norm"]),
)
said(
    "a pipeline without passes would leave the model as it is; name at least one of graphprune.passes: .*",
    lambda: gp.Pipeline.parse(""),
)

# --------------------------------------------------------------------------------- the command line


@case(r".*\.pt cannot be loaded: UnpicklingError: .+")
def a_text_for_a_model(folder: Path) -> None:
    (folder / "model.pt").write_text("no model")
    cli.load_model(str(folder / "model.pt"))


@case("it is nothing that torch.save writes")
def a_text_is_not_unpickled(folder: Path) -> None:
    (folder / "model.pt").write_text("no model")
    with pytest.raises(gp.InvalidRequestError) as caught:
        cli.load_model(str(folder / "model.pt"))
    assert caught.value.__cause__ is not None
    raise caught.value.__cause__


@case(
    r".*\.pt gives a dict, as of weights without their model; name a package\.module:callable that builds "
    "the model and loads them"
)
def weights_for_a_model(folder: Path) -> None:
    torch.save(net().state_dict(), folder / "model.pt")
    cli.load_model(str(folder / "model.pt"))


@case(r".*\.pt cannot be loaded: .+")
def half_a_model(folder: Path) -> None:
    (folder / "model.pt").write_bytes(pickle.dumps(1, protocol=2)[:-1])
    cli.load_model(str(folder / "model.pt"))


def fails() -> None:
    return 1 + "2"  # type: ignore[operator,return-value]


said(
    r"'tests.message_cases_files:fails' does not give a model: TypeError: unsupported operand .*"
    r"message_cases_files\.py:\d+, in fails\)",
    lambda: cli.load_model("tests.message_cases_files:fails"),
)


@case(r".*\.npy holds no samples: its shape \(0, 6\) has to begin with their number")
def no_samples(folder: Path) -> None:
    np.save(folder / "samples.npy", np.zeros((0, 6)))
    cli.load_batches(str(folder / "samples.npy"))


said(r"--input '2,-6' is not a shape such as 2,3,224,224", lambda: cli.example_inputs(["2,-6"]))
