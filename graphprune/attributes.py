"""The numbers that modules hold: what describes their tensors, and sizes that their code goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphprune.inference import Inference, Step
from graphprune.layout import Axis, Layout, can_split, free_axes, kept_size, size_of, split
from graphprune.rules.recurrent import GATES

aten = torch.ops.aten

# Ways of following that are tried at most; each is a run without data.
_WAYS = 16


def ways_to_follow_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> Iterator[None]:
    """Change the whole-number attributes that a module's own operators were given as sizes.

    `self.num_heads` is one where the module's code reshapes to it. Such an attribute takes the size
    that the dimension has now; where its value stood for several, one after the other is tried, alike
    in modules that are alike. A value could be equal to a size by accident, so the model has to be
    verified after each change.

    Args:
        model: a slim model, in the code of its own class; it is changed before each yield.
        inference: the operators of the original.
        kept: how many slots of each cut axis are left.

    """
    held = _held_sizes(model, inference, kept)
    choices = [sorted(sizes, key=lambda size: size == value) for _, _, value, sizes in held]
    for way in islice(product(*choices), _WAYS if held else 0):
        for ((_, name, _, _), modules), size in zip(held.items(), way, strict=True):
            for module in modules:
                setattr(module, name, size)
        yield


def _held_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> dict[tuple[type, str, int, frozenset[int]], list[nn.Module]]:
    """Return modules by class, attribute, its value, and the sizes that the value may stand for now."""
    sizes: dict[tuple[str, int], set[int]] = {}
    for step in inference.steps:
        for before, after in _sizes_given(step, kept):
            sizes.setdefault((step.place.module, before), set()).add(after)
    held: dict[tuple[type, str, int, frozenset[int]], list[nn.Module]] = {}
    for path, module in model.named_modules():
        if _is_of_torch(module):
            continue
        for name, value in vars(module).items():
            found = sizes.get((path, value), set()) if type(value) is int else set()
            if found and found != {value}:
                held.setdefault((type(module), name, value, frozenset(found)), []).append(module)
    return held


def axes_given_as_sizes(
    model: nn.Module, inference: Inference, kept: Mapping[Axis, int]
) -> set[Axis]:
    """Return the cut axes in dimensions whose size an operator in code of one's own was given."""
    own = {path for path, module in model.named_modules() if not _is_of_torch(module)}
    found: set[Axis] = set()
    for step in inference.steps:
        for layout in _dimensions_given(step) if step.place.module in own else ():
            found.update(axis for axis in free_axes(layout) if axis in kept)
    return found


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _sizes_given(step: Step, kept: Mapping[Axis, int]) -> Iterator[tuple[int, int]]:
    """Yield the numbers among a step's arguments that are sizes of its results, and those sizes now."""
    for layout in _dimensions_given(step):
        yield size_of(layout), kept_size(layout, kept)


def _dimensions_given(step: Step) -> Iterator[Layout]:
    """Yield the dimensions of a step's results whose sizes are among its arguments."""
    numbers = {leaf for leaf in pytree.tree_leaves(step.arguments) if type(leaf) is int}
    for value in step.outputs:
        for layout in value.layouts:
            if size_of(layout) in numbers:
                yield layout


def describe_tensors(model: nn.Module, inference: Inference, kept: Mapping[Axis, int]) -> None:
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


def _recurrent(module: Any, step: Step | None, kept: Mapping[Axis, int]) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // GATES[getattr(aten, module.mode.lower())]
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
