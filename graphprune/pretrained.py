"""Slim transformers models as folders that `from_pretrained` reads, where a config can say their sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.atomic_files import drafted_folder
from graphprune.configs import has_config, tensors_of
from graphprune.errors import InvalidRequestError
from graphprune.fitting import find
from graphprune.forms import Slimmed
from graphprune.inputs import call, output_tensors
from graphprune.state import evaluating
from graphprune.unfitting import why_none

_TOLERANCE = 1e-4

# What an earlier model may have left in the folder, and another one's config would not fit.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def save_pretrained(result: Slimmed, folder: str | Path) -> None:
    """Write a slim transformers model so that its class's `from_pretrained` reads it again.

    Which numbers of the config have to change is found by building the model from changed ones, without
    memory for its weights: as it is read from config.json it has to have the slim model's shapes, to call
    the same operators with the same numbers, and to give what the slim model gives. A tokenizer is for you
    to save beside it.

    Args:
        result: what `graphprune.slimmed` returned for a transformers model, in module form.
        folder: where `save_pretrained` of the model writes config and weights.

    Raises:
        InvalidRequestError: the model is no transformers model in module form, or no config of its kind
            says its sizes: widths that differ from layer to layer, or fewer heads where the code computes
            the size of a head from their number.

    """
    model: Any = result.model
    if result.form != "module":
        raise InvalidRequestError(
            f"the slim model is a graph, which no config builds: {result.why_graph}; use graphprune.save"
        )
    if not (has_config(model) and hasattr(model, "save_pretrained")):
        raise InvalidRequestError(
            f"{type(model).__name__} has no config and no save_pretrained of transformers; use "
            "graphprune.save"
        )
    fit = find(result)
    if fit.model is None:
        raise InvalidRequestError(f"{why_none(fit)}, or use graphprune.save, which needs no config")
    rebuilt: Any = fit.model
    if not _gives_the_same(rebuilt, model, result):
        raise InvalidRequestError(
            f"{type(model).__name__} built from a config of the slim model's sizes gives other values than "
            "the slim model: its code computes something from the config that no operator shows; use "
            "graphprune.save"
        )
    if hasattr(model, "generation_config"):
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    with drafted_folder(Path(folder), _WEIGHTS, last="config.json") as draft:
        rebuilt.save_pretrained(draft)


def _gives_the_same(rebuilt: nn.Module, model: nn.Module, result: Slimmed) -> bool:
    slim = tensors_of(model)
    for name, tensor in tensors_of(rebuilt).items():
        tensor.data = tensor.data.to(slim[name].device, slim[name].dtype)
    with evaluating(rebuilt), evaluating(model):
        outputs = [
            [tensor for _, tensor in output_tensors(call(one, result.inputs))]
            for one in (rebuilt, model)
        ]
    return len(outputs[0]) == len(outputs[1]) and all(
        a.shape == b.shape
        and torch.allclose(a, b, _TOLERANCE, _TOLERANCE * float(b.abs().max()), equal_nan=True)
        for a, b in zip(*outputs, strict=True)
    )
