"""What is said of checkpoints that are planned and shrunk on disk; see message_cases.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import graphprune as gp
from graphprune import cli
from graphprune.utils.safetensors_blocks import INDEX, Checkpoint
from graphprune.verify import check_runs
from tests.message_cases import CASES, Case, X, case, net, said
from tests.models import example


def empty() -> nn.Module:
    return net().to("meta")


def written(folder: Path, **changes: Tensor | None) -> Path:
    """Write a checkpoint of `net`, some tensors changed, or left out where they are None."""
    state = net().state_dict() | {name.replace("__", "."): value for name, value in changes.items()}
    path = folder / "model.safetensors"
    save_file({name: value for name, value in state.items() if value is not None}, path)
    return path


def indexed(folder: Path, **moved: str) -> Path:
    """Write a checkpoint of `net` in two files, some tensors said to be elsewhere."""
    state = net().state_dict()
    weight_map = {name: f"{name[0]}.safetensors" for name in state}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    weight_map |= {name.replace("__", "."): file for name, file in moved.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def plan() -> gp.Plan:
    return gp.slimmed(net(), 0.5, X).plan


def shrunk(source: Path, target: Path) -> gp.ShrunkCheckpoint:
    return gp.shrink_checkpoint(empty(), plan(), source, target, X)


# -------------------------------------------------------------------------------- planning by files


def by_files(says: str, model: Callable[[], nn.Module] = empty, **options: Any) -> None:
    def asked(folder: Path) -> None:
        gp.slim(model(), 0.5, X, weights=written(folder), **options)

    CASES.append(Case(f"by_files_{len(CASES)}", says, asked))


by_files(
    "weights='.*' is for a model on the meta device, and this Sequential holds values of its own; build it "
    r"under torch\.device\('meta'\)",
    net,
)
by_files(
    "importance='taylor' with steps=1 cannot be computed from files; with weights= choose from random, l1, "
    "l2, lamp, bn_scale, in one step, or load the model",
    importance="taylor",
)
by_files(
    "importance='l2' with steps=3 cannot be computed from files; with weights= choose from .*",
    steps=3,
)
by_files(
    "data, compensate and latency need a model that runs, and weights= is for one without values; load the "
    "model, or leave them out",
    data=[X],
)

# ------------------------------------------------------------------------------------- bad files


@case(
    r".*/model\.safetensors lacks 2\.bias of Sequential; pass the model that the checkpoint is of"
)
def too_few_tensors(folder: Path) -> None:
    gp.slim(empty(), 0.5, X, weights=written(folder, **{"2__bias": None}))


@case(
    r".*/model\.safetensors holds 4\.bias, which Sequential lacks; pass the model that the checkpoint is of"
)
def too_many_tensors(folder: Path) -> None:
    shrunk(written(folder, **{"4__bias": torch.ones(3)}), folder / "slim")


@case(
    r"2\.weight has shape \(3, 9\) in .*/model\.safetensors, and \(3, 8\) in Sequential; pass the model "
    "that the checkpoint is of"
)
def another_shape(folder: Path) -> None:
    shrunk(written(folder, **{"2__weight": torch.ones(3, 9)}), folder / "slim")


@case(
    r".*/model\.safetensors holds 2\.bias in F8_E8M0, which cannot be cut; those that can are BOOL, .*"
)
def another_type(folder: Path) -> None:
    odd = torch.ones(3).to(torch.float8_e8m0fnu)
    shrunk(written(folder, **{"2__bias": odd}), folder / "slim")


@case(
    r".*/case\d+ holds neither model\.safetensors\.index\.json nor model\.safetensors; save the weights as "
    "safetensors first"
)
def a_folder_without_weights(folder: Path) -> None:
    shrunk(folder, folder / "slim")


@case(r".*/2\.safetensors cannot be read as safetensors: .*[Nn]o such file.*")
def a_missing_shard(folder: Path) -> None:
    (indexed(folder) / "2.safetensors").unlink()
    shrunk(folder, folder / "slim")


@case(r".*/2\.safetensors cannot be read as safetensors: .*incomplete.*")
def a_truncated_shard(folder: Path) -> None:
    path = indexed(folder) / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    shrunk(folder, folder / "slim")


@case(r".*/model\.safetensors cannot be read as safetensors: .*")
def a_shard_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").write_text("weights")
    shrunk(folder, folder / "slim")


@case(
    r".*index\.json says that 2\.bias is in 0\.safetensors, and 2\.safetensors holds it; 1 tensors are not "
    "where it says"
)
def an_index_that_is_wrong(folder: Path) -> None:
    shrunk(indexed(folder, **{"2__bias": "0.safetensors"}), folder / "slim")


@case(r".*index\.json is no index of a checkpoint: its weight_map is None, not an object")
def an_index_that_is_none(folder: Path) -> None:
    (folder / INDEX).write_text("{}")
    shrunk(folder, folder / "slim")


@case(r".*/model\.safetensors ends before its tensors do")
def a_file_cut_short_while_it_is_read(folder: Path) -> None:
    path = written(folder)
    stored = Checkpoint.of(path).tensors["2.weight"]
    path.write_bytes(path.read_bytes()[: stored.start + 4])
    list(stored.blocks())


# -------------------------------------------------------------------------------------- the target


@case(".* is where the source is, which would be overwritten; name another folder")
def the_source_as_target(folder: Path) -> None:
    shrunk(written(folder), folder)


@case(
    r".*/slim holds model\.safetensors of another model, plan or source; name an empty folder, or remove "
    "them"
)
def a_target_of_something_else(folder: Path) -> None:
    (folder / "slim").mkdir()
    written(folder / "slim")
    shrunk(written(folder), folder / "slim")


@case(
    r".*/slim needs \d+ bytes more, and 10 are free there; name a folder on another disk",
)
def a_full_disk(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        shrunk(written(folder), folder / "slim")


@case(r".*/config\.json is no config: .*")
def a_config_that_is_none(folder: Path) -> None:
    written(folder)
    (folder / "config.json").write_text("{")
    shrunk(folder, folder / "slim")


@case(
    r"no config\.json says the sizes of the slim model \(Sequential has no config of transformers\), so "
    r"from_pretrained cannot build it: that of the source is config\.original\.json; load with "
    r"graphprune\.load\('.*/slim', model\)"
)
def a_config_of_something_else(folder: Path) -> None:
    written(folder)
    (folder / "config.json").write_text("{}")
    shrunk(folder, folder / "slim")


# ------------------------------------------------------------------------------------- loading


@case(r".*/graphprune\.json is no file that graphprune\.shrink_checkpoint wrote: .*No such file.*")
def a_folder_without_a_plan(folder: Path) -> None:
    written(folder)
    gp.load(folder, net(), X)


@case(
    r".*/slim holds no values of model\.rotary_emb\.inv_freq.*, which LlamaForCausalLM computes when it is "
    "built, and on the meta device does not; build the model on the CPU"
)
def a_buffer_that_no_file_holds(folder: Path) -> None:
    given = example("llama")
    given.model.save_pretrained(folder)
    cut = gp.slimmed(given.model, 0.5, given.inputs).plan
    gp.shrink_checkpoint(given.model, cut, folder, folder / "slim", given.inputs)
    gp.load(folder / "slim", given.model.to("meta"), given.inputs)


said(
    "the slim model's operators do not give what the original's do without the removed channels",
    lambda: check_runs(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        gp.Inputs(X),
        gp.analyze(net(), X).inference,
        {},
    ),
)

# ------------------------------------------------------------------------------- the command line

said(
    "--data, --compensate would run the model, and --checkpoint is shrunk without running it; leave them "
    "out, or load the model and write a file",
    lambda: cli._refuse_with_checkpoint(["--data", "--compensate"]),
)
said(
    r"'tests\.message_cases_checkpoints:needs_values' gives no model under torch\.device\('meta'\), where "
    r"--checkpoint builds it to save memory: .*",
    lambda: cli.without_weights("tests.message_cases_checkpoints:needs_values", Path("folder")),
)
said(
    "os:getcwd gives a str, not a model",
    lambda: cli.without_weights("os:getcwd", Path("folder")),
)


@case(
    r"transformers cannot build a model from .*/config\.json; name one as package\.module:callable: .*"
)
def a_folder_without_a_config(folder: Path) -> None:
    cli.without_weights("", folder)


def needs_values() -> nn.Module:
    model = net()
    model[0].weight.data *= float(model[0].weight.sum())
    return model
