"""What torch.nn modules hold about their tensors, made true again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._ops import OpOverloadPacket

from graphprune.inference.recorded import Inference, Step
from graphprune.layout import Axis, can_split, size_of, split
from graphprune.masks import kept_size
from graphprune.rules.recurrent import GATES

aten = torch.ops.aten


def describe_tensors(model: nn.Module, inference: Inference, kept: Mapping[Axis, int]) -> None:
    """Make the numbers that torch.nn modules hold about their tensors true again."""
    steps: dict[str, list[Step]] = {}
    for step in inference.steps:
        steps.setdefault(step.place.module, []).append(step)
    for path, module in model.named_modules():
        for kind, update in _UPDATES.items():
            if isinstance(module, kind):
                update(module, steps.get(path, []), kept)


Steps: TypeAlias = Sequence[Step]
"""The operators that a module called itself, in order."""


def _calls(steps: Steps, operator: OpOverloadPacket) -> list[Step]:
    return [step for step in steps if step.func.overloadpacket is operator]


def _convolution(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    weight = module.weight
    for step in _calls(steps, aten.convolution)[:1]:
        outer = (step.outputs if module.transposed else step.inputs)[0].layouts[1]
        module.groups = kept_size(outer, kept) // weight.shape[1]
    by_weight = (weight.shape[0], weight.shape[1] * module.groups)
    module.in_channels, module.out_channels = by_weight if module.transposed else by_weight[::-1]


def _linear(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _batch_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    held = module.weight if module.weight is not None else module.running_mean
    if held is not None:
        module.num_features = held.shape[0]
    else:
        (module.num_features,) = _sizes_read(steps, slice(1, 2), (module.num_features,), kept)


def _layer_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    shape = tuple(module.normalized_shape)
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    else:
        module.normalized_shape = _sizes_read(steps, slice(-len(shape), None), shape, kept)


def _sizes_read(
    steps: Steps, dims: slice, sizes: tuple[int, ...], kept: Mapping[Axis, int]
) -> tuple[int, ...]:
    """Return what is left of sizes along these dimensions of what the operators read."""
    for step in steps:
        for value in step.inputs:
            if tuple(map(size_of, value.layouts[dims])) == sizes:
                return tuple(kept_size(layout, kept) for layout in value.layouts[dims])
    return sizes


def _group_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    for step in _calls(steps, aten.native_group_norm)[:1]:
        module.num_groups = kept_groups(step, kept)
        module.num_channels = kept_size(step.inputs[0].layouts[1], kept)


def kept_groups(step: Step, kept: Mapping[Axis, int]) -> int:
    """Return how many normalisation groups are left of a group norm's."""
    channels, each = step.inputs[0].layouts[1], step.arguments["C"] // step.arguments["group"]
    if not can_split(channels, each):
        return int(step.arguments["group"])
    return kept_size(split(channels, each, step.place)[0], kept)


def _embedding(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.embedding_dim = module.weight.shape[1]


def _prelu(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.num_parameters = module.weight.shape[0]


def _recurrent(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // GATES[getattr(aten, module.mode.lower())]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


def _recurrent_cell(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _bilinear(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _attention(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    """Describe attention whose heads still make up its width; its code can run no other."""
    first = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    inside, width = module.out_proj.weight.shape[1], first.shape[1]
    last = [step.outputs[0].layouts[-1] for step in _calls(steps, aten.view)]
    features = next((x for x in last if size_of(x) == module.head_dim), None)
    if features is None or inside != width:
        return
    if module.in_proj_weight is None:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    else:
        module.kdim = module.vdim = width
    module.embed_dim, module.head_dim = width, kept_size(features, kept)
    module.num_heads = width // module.head_dim


_UPDATES: dict[type[nn.Module], Callable[[Any, Steps, Mapping[Axis, int]], None]] = {
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
    nn.MultiheadAttention: _attention,
}

DESCRIBED = tuple(_UPDATES)
"""The classes of torch.nn whose attributes `describe_tensors` makes true."""
