"""A smaller copy of a model: parameters and buffers sliced, and the attributes that describe them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.inference import Inference, Step
from graphprune.layout import Axis, Layout, Mask, can_split, kept_size, mask_of, split
from graphprune.state import copy_with, evaluating

aten = torch.ops.aten


def shrunk(model: nn.Module, inference: Inference, masks: Mapping[Axis, Mask]) -> nn.Module:
    """Return a copy of the model whose tensors lack the removed slots, ties kept.

    The forward code is the model's own; `graphprune.literals` rewrites a graph's.
    """

    def slim(name: str, tensor: Tensor) -> Tensor | None:
        return sliced(tensor, inference.parameters.get(name, []), masks)

    slimmer = copy_with(model, slim)
    kept = {axis: int(mask.sum()) for axis, mask in masks.items()}
    with evaluating(
        slimmer
    ):  # reading a weight that is computed in training may update its buffers
        _update_attributes(slimmer, inference, kept)
    return slimmer


def sliced(tensor: Tensor, layouts: list[Layout], masks: Mapping[Axis, Mask]) -> Tensor | None:
    """Return the tensor without the removed slots, or None if it loses none."""
    result = tensor.detach()
    for dim, layout in enumerate(layouts):
        mask = mask_of(layout, masks)
        if not mask.all():
            index = torch.from_numpy(mask.nonzero()[0]).to(tensor.device)
            result = result.index_select(dim, index)
    return None if result.shape == tensor.shape else result.contiguous()


def _update_attributes(model: nn.Module, inference: Inference, kept: Mapping[Axis, int]) -> None:
    """Make the numbers that torch.nn modules hold about their tensors true again."""
    calls: dict[str, Step] = {}
    for step in inference.steps:
        if step.func.overloadpacket in (aten.convolution, aten.native_group_norm):
            calls.setdefault(step.place.module, step)
    for path, module in model.named_modules():
        for kind, update in _UPDATES.items():
            if isinstance(module, kind):
                update(module, calls.get(path), kept)


def _convolution(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    weight = module.weight
    if step is not None:
        outer = (step.outputs if module.transposed else step.inputs)[0].layouts[1]
        module.groups = kept_size(outer, kept) // weight.shape[1]
    by_weight = (weight.shape[0], weight.shape[1] * module.groups)
    module.in_channels, module.out_channels = by_weight if module.transposed else by_weight[::-1]


def _linear(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _batch_norm(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    held = module.weight if module.weight is not None else module.running_mean
    if held is not None:
        module.num_features = held.shape[0]


def _layer_norm(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    if step is not None:
        module.num_groups = kept_groups(step, kept)
        module.num_channels = kept_size(step.inputs[0].layouts[1], kept)


def kept_groups(step: Step, kept: Mapping[Axis, int]) -> int:
    """Return how many normalisation groups are left of a group norm's."""
    channels, each = step.inputs[0].layouts[1], step.arguments["C"] // step.arguments["group"]
    if not can_split(channels, each):
        return int(step.arguments["group"])
    return kept_size(split(channels, each, step.place)[0], kept)


def _embedding(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.embedding_dim = module.weight.shape[1]


def _prelu(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.num_parameters = module.weight.shape[0]


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def _recurrent(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // _GATES[module.mode]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


def _recurrent_cell(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _bilinear(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


_UPDATES: dict[type[nn.Module], Callable[[Any, Step | None, Mapping[Axis, int]], None]] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent_cell,
    nn.Bilinear: _bilinear,
}
