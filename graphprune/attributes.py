"""The numbers that modules hold: what describes their tensors, and sizes that their code goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._ops import OpOverloadPacket
from torch.utils import _pytree as pytree

from graphprune.inference import Inference, Step
from graphprune.layout import Axis, Layout, can_split, free_axes, kept_size, size_of, split
from graphprune.rules.recurrent import GATES

aten = torch.ops.aten

# Ways of following that are tried at most; each is a run without data.
_WAYS = 32


def ways_to_follow_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> Iterator[None]:
    """Change the whole-number attributes that a module's own operators go by.

    `self.num_heads` is one where the module's code reshapes to it: it takes the size that the dimension
    has now. Where its value stood for several, one after the other is tried, alike in modules that are
    alike. A value may be equal to a size by accident, so leaving it is tried as well; and a number that
    is only the size of something there (`self.width // self.num_heads`) is left as long as that works.
    The model has to be verified after each change.

    Args:
        model: a slim model, in the code of its own class; it is changed before each yield.
        inference: the operators of the original.
        kept: how many slots of each cut axis are left.

    """
    held = _held_sizes(model, inference, kept)
    choices = [choice for _, _, choice in held]
    for way in islice(_nearest_first(choices), _WAYS if held else 0):
        for ((_, name, _), modules), size in zip(held.items(), way, strict=True):
            for module in modules:
                setattr(module, name, size)
        yield


def _nearest_first(choices: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Yield picks of one from each of the choices, first those that take the first of most."""
    for rank in range(sum(len(choice) - 1 for choice in choices) + 1):
        yield from _of_rank(choices, rank)


def _of_rank(choices: Sequence[Sequence[int]], rank: int) -> Iterator[tuple[int, ...]]:
    """Yield the picks whose positions in the choices add up to the rank."""
    if not choices:
        yield from [()] if rank == 0 else []
        return
    for position, picked in enumerate(choices[0][: rank + 1]):
        for rest in _of_rank(choices[1:], rank - position):
            yield (picked, *rest)


def _held_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> dict[tuple[type, str, tuple[int, ...]], list[nn.Module]]:
    """Return modules by class, attribute, and what the attribute may be now, the likeliest first."""
    given: dict[tuple[str, int], set[int]] = {}
    there: dict[tuple[str, int], set[int]] = {}
    for step in inference.steps:
        layouts = [layout for value in (*step.inputs, *step.outputs) for layout in value.layouts]
        for sizes, found in ((given, _dimensions_given(step)), (there, layouts)):
            for layout in found:
                key = step.place.module, size_of(layout)
                sizes.setdefault(key, set()).add(kept_size(layout, kept))
    held: dict[tuple[type, str, tuple[int, ...]], list[nn.Module]] = {}
    for path, module in model.named_modules():
        if _is_of_torch(module):
            continue
        for name, value in vars(module).items():
            if type(value) is not int:
                continue
            likely = sorted(given.get((path, value), set()) - {value})
            others = sorted(there.get((path, value), set()) - {value, *likely})
            if likely or others:
                choice = type(module), name, (*likely, value, *others)
                held.setdefault(choice, []).append(module)
    return held


def axes_given_as_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int], *, of_attention: bool
) -> set[Axis]:
    """Return the cut axes in dimensions whose size an operator in code of one's own was given.

    With `of_attention` those that nn.MultiheadAttention was given count too: it holds its number of heads.
    """
    own = {
        path
        for path, module in model.named_modules()
        if not _is_of_torch(module) or (of_attention and isinstance(module, nn.MultiheadAttention))
    }
    found: set[Axis] = set()
    for step in inference.steps:
        for layout in _dimensions_given(step) if step.place.module in own else ():
            found.update(axis for axis in free_axes(layout) if axis in kept)
    return found


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _dimensions_given(step: Step) -> Iterator[Layout]:
    """Yield the dimensions of a step's results whose sizes are among its arguments."""
    numbers = {leaf for leaf in pytree.tree_leaves(step.arguments) if type(leaf) is int}
    for value in step.outputs:
        for layout in value.layouts:
            if size_of(layout) in numbers:
                yield layout


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


def _layer_norm(module: Any, steps: Steps, kept: Mapping[Axis, int]) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


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
