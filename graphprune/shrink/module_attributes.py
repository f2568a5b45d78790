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


def _describe_convolution(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    weight = module.weight
    # weight: `[out, in / groups, ...]`, transposed `[in, out / groups, ...]`. The groups that are
    # left are the channels of the side that was divided by them, over what is left of dimension 1.
    for step in _calls(steps, aten.convolution)[:1]:
        outer_layout = (step.outputs if module.transposed else step.inputs)[0].layouts[1]
        module.groups = kept_size(outer_layout, kept) // weight.shape[1]
    # Only now, with the new number of groups.
    by_weight = (weight.shape[0], weight.shape[1] * module.groups)
    module.in_channels, module.out_channels = by_weight if module.transposed else by_weight[::-1]


def _describe_linear(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _describe_batch_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    channel_tensor = module.weight if module.weight is not None else module.running_mean
    if channel_tensor is not None:
        module.num_features = channel_tensor.shape[0]
    else:
        # Without weights and statistics: by its input, `[batch, channels, ...]`.
        (module.num_features,) = _find_kept_sizes(steps, slice(1, 2), (module.num_features,), kept)


def _describe_layer_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    shape = tuple(module.normalized_shape)
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    else:
        module.normalized_shape = _find_kept_sizes(steps, slice(-len(shape), None), shape, kept)


def _find_kept_sizes(
    steps: Steps, dims: slice, sizes: tuple[int, ...], kept: Mapping[Axis, int]
) -> tuple[int, ...]:
    """Return what is left of sizes along these dimensions of what the operators read."""
    for step in steps:
        for value in step.inputs:
            if tuple(map(size_of, value.layouts[dims])) == sizes:
                return tuple(kept_size(layout, kept) for layout in value.layouts[dims])
    return sizes


def _describe_group_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    for step in _calls(steps, aten.native_group_norm)[:1]:
        module.num_groups = kept_groups(step, kept)
        module.num_channels = kept_size(step.inputs[0].layouts[1], kept)


def kept_groups(step: Step, kept: Mapping[Axis, int]) -> int:
    """Return how many normalisation groups are left of a group norm's."""
    channels, group_size = step.inputs[0].layouts[1], step.arguments["C"] // step.arguments["group"]
    if not can_split(channels, group_size):
        return int(step.arguments["group"])
    return kept_size(split(channels, group_size, step.place)[0], kept)


def _describe_embedding(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.embedding_dim = module.weight.shape[1]


def _describe_prelu(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.num_parameters = module.weight.shape[0]


def _describe_recurrent(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    # weight_ih: `[gates * hidden, input]`, and an LSTM has four gates.
    module.hidden_size = module.weight_ih_l0.shape[0] // GATES[getattr(aten, module.mode.lower())]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


def _describe_recurrent_cell(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _describe_bilinear(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _describe_attention(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    """Describe attention whose heads still make up its width; its code can run no other."""
    input_projection = (
        module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    )
    inner_width, width = module.out_proj.weight.shape[1], input_projection.shape[1]
    last_layouts = [step.outputs[0].layouts[-1] for step in _calls(steps, aten.view)]
    features = next((x for x in last_layouts if size_of(x) == module.head_dim), None)
    # out_proj.weight: `[width, heads * head size]`. Its code reshapes to the width that it reads.
    if features is None or inner_width != width:
        return
    if module.in_proj_weight is None:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    else:
        module.kdim = module.vdim = width
    module.embed_dim, module.head_dim = width, kept_size(features, kept)
    module.num_heads = width // module.head_dim


_UPDATES: dict[type[nn.Module], Callable[[Any, Steps, Mapping[Axis, int]], None]] = {
    nn.modules.conv._ConvNd: _describe_convolution,
    nn.Linear: _describe_linear,
    nn.modules.batchnorm._NormBase: _describe_batch_norm,
    nn.LayerNorm: _describe_layer_norm,
    nn.RMSNorm: _describe_layer_norm,
    nn.GroupNorm: _describe_group_norm,
    nn.Embedding: _describe_embedding,
    nn.EmbeddingBag: _describe_embedding,
    nn.PReLU: _describe_prelu,
    nn.RNNBase: _describe_recurrent,
    nn.RNNCellBase: _describe_recurrent_cell,
    nn.Bilinear: _describe_bilinear,
    nn.MultiheadAttention: _describe_attention,
}

DESCRIBED_CLASSES = tuple(_UPDATES)
"""The classes of torch.nn whose attributes `describe_tensors` makes true."""
