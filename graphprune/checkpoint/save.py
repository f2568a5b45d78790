"""Slim models as files: tensors in safetensors, the plan in its header, nothing that could run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError, PlanError, listed
from graphprune.report.result import Slimmed
from graphprune.selection.plan import Plan
from graphprune.slimming.slim import slimmed
from graphprune.utils import json_files
from graphprune.utils.atomic_files import check_target_path, draft_file
from graphprune.utils.safetensors_blocks import Checkpoint, CheckpointWeights
from graphprune.utils.tensors import copy_with, may_be_an_order, named_tensors

FORMAT = "graphprune-model"
VERSION = "1"

# Beside the weights of a folder that `shrink_checkpoint` wrote.
PLAN_FILE = "graphprune.json"
_FOLDER_FORMAT = "graphprune-checkpoint"


def save(result: Slimmed, path: str | Path) -> None:
    """Write a slim model with its plan; what training changed since is written too.

    The file holds the tensors of `result.model.state_dict()`, each once, in safetensors' format, and
    the plan, the form and versions in its header. It is written beside and then put in place, so that
    no half of a file is ever found there. Graphs that other passes rewrote are not for this: export
    them, or keep the pipeline and run it again.

    Args:
        result: what `graphprune.slimmed` returned.
        path: ending in .safetensors, in a folder that there is.

    Raises:
        InvalidRequestError: the path is not such a one.

    """
    header = {
        "format": FORMAT, "version": VERSION, "plan": result.plan.to_json(), "form": result.form,
        "torch": torch.__version__,
    }  # fmt: skip
    with draft_file(check_target_path(path, ".safetensors")) as draft:
        save_file(_collect_tensors_once(result.model), draft, header)


def load(path: str | Path, model: Any, example_inputs: Any = None) -> nn.Module:
    """Return the slim model of a file that `save` wrote, or of a folder that `shrink_checkpoint` wrote.

    Args:
        path: the file or the folder.
        model: the original, with whatever weights: a fresh one will do. It is not changed. For a folder it
            may be on the meta device: what is read is then on the CPU, in the model's own precision.
        example_inputs: of the original, as for `slim`.

    Raises:
        InvalidRequestError: the file is none that `save` wrote, or holds other tensors than this model.
        PlanError: the plan does not fit the model.

    """
    if Path(path).is_dir():
        return _load_folder(Path(path), model, example_inputs)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            stored_tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidRequestError(f"{path} cannot be read as safetensors: {error}") from error
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InvalidRequestError(
            f"{path} is no slim model that this version of graphprune.save wrote: its header says format "
            f"{header.get('format')!r}, version {header.get('version')!r}"
        )
    try:
        plan = Plan.from_json(header.get("plan", ""))
    except ValueError as error:
        raise PlanError(f"the plan in {path} cannot be read: {error}") from error
    form: Any = header.get("form", "auto")
    slim = slimmed(model, example_inputs=example_inputs, plan=plan, form=form, verify=False).model
    _fill(slim, stored_tensors, path)
    return slim


def folder_content(plan: Plan, form: str) -> dict[str, Any]:
    """Return what `load` has to find in a folder, beside the weights."""
    return {
        "format": _FOLDER_FORMAT, "version": VERSION, "form": form, "torch": torch.__version__,
        "plan": json.loads(plan.to_json()),
    }  # fmt: skip


def _load_folder(folder: Path, model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return the slim model of a folder, filled tensor by tensor."""
    path = folder / PLAN_FILE
    try:
        content = json_files.require_format(json_files.read(path), _FOLDER_FORMAT, VERSION)
        plan, form = Plan.of_content(content.get("plan")), content.get("form", "auto")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{path} is no file that graphprune.shrink_checkpoint wrote: {error}"
        ) from error
    weights, model_tensors = (
        CheckpointWeights.of(Checkpoint.of(folder), model),
        named_tensors(model),
    )

    def move_to_meta(name: str, tensor: Tensor) -> Tensor | None:
        # Without memory, but for what inference reads the values of: orders of channels.
        is_stored = name in weights.by_name and not may_be_an_order(tensor)
        return tensor.detach().to("meta") if is_stored else None

    empty = copy_with(model, move_to_meta)
    slim = slimmed(empty, example_inputs=example_inputs, plan=plan, form=form, verify=False).model
    weights.check_shapes(slim)

    def read_values(name: str, tensor: Tensor) -> Tensor | None:
        if name not in weights.by_name:
            return None
        device = "cpu" if model_tensors[name].is_meta else model_tensors[name].device
        # In the model's precision and a block at a time: no second copy in memory.
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        weights.by_name[name].copy_to(values)
        return values

    filled = copy_with(slim, read_values)
    missing = [name for name, tensor in named_tensors(filled).items() if tensor.is_meta]
    if missing:
        raise InvalidRequestError(
            f"{folder} holds no values of {listed(missing)}, which {type(model).__name__} computes when "
            "it is built, and on the meta device does not; build the model on the CPU"
        )
    return filled


def _collect_tensors_once(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state, tied ones under their first name."""
    visited_ids: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # keep_vars gives the tensors themselves: without it tied ones would not be one object.
        if isinstance(tensor, Tensor) and id(tensor) not in visited_ids:
            visited_ids.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def _fill(model: nn.Module, stored_tensors: dict[str, Tensor], path: str | Path) -> None:
    model_tensors = _collect_tensors_once(model)
    if stored_tensors.keys() != model_tensors.keys():
        differing = sorted(stored_tensors.keys() ^ model_tensors.keys())
        raise InvalidRequestError(
            f"{path} and the model differ in {', '.join(differing[:5])}"
            f"{' and more' if differing[5:] else ''}; a file is for the model that it was made from"
        )
    for name, tensor in stored_tensors.items():
        if tensor.shape != model_tensors[name].shape:
            raise InvalidRequestError(
                f"{name} has shape {tuple(tensor.shape)} in {path}, and "
                f"{tuple(model_tensors[name].shape)} in the model without what the plan removes"
            )
    with torch.no_grad():
        state = model.state_dict(keep_vars=True)
        for name, tensor in stored_tensors.items():
            state[name].copy_(tensor)
