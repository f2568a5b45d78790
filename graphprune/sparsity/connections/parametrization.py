"""Connections that are off stay off: parametrizations that hold weights at zero while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.groups.groups import Dependencies
from graphprune.importance import Loss
from graphprune.inference.infer import infer
from graphprune.sparsity.connections.connectivity import PatternName, choose_connectivity
from graphprune.sparsity.connections.sites import Connections
from graphprune.utils.tensors import copy_with


class ConnectionMask(nn.Module):
    """A parametrization of a convolution's weight that multiplies it by its connections, 0 or 1.

    Attributes:
        mask: `[outputs, inputs, 1, ...]` of booleans, a buffer.
        watched: whether the derivative of the loss by all connections is noted, also by those that are off.
        gradient: that derivative, by the masked weight, of the last backward pass while it was watched.

    """

    mask: Tensor

    def __init__(self, weight: Tensor, connections: Connections) -> None:
        super().__init__()
        self.register_buffer("mask", mask_like(weight, connections))
        self.watched = False
        self.gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, zero where a connection is off."""
        masked = weight * self.mask
        if self.watched and masked.requires_grad:
            # by the product: the derivative by the weight itself is zero wherever the mask is
            masked.register_hook(self._note)
        return masked

    def _note(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()

    @property
    def connections(self) -> Connections:
        """Which connections are on, `[outputs, inputs]`."""
        return np.copy(self.mask.flatten(1).cpu().numpy())

    def connect(self, connections: Connections) -> None:
        """Have those connections on and no others."""
        self.mask.copy_(mask_like(self.mask, connections))


def mask_like(weight: Tensor, connections: Connections) -> Tensor:
    """Return connections as a mask of a weight, `[outputs, inputs, 1, ...]`."""
    # a copy, since torch.from_numpy shares memory; for a weight `[o, i, 3, 3]` a mask `[o, i, 1, 1]`
    mask = torch.from_numpy(np.array(connections))
    return mask.reshape(*mask.shape, *[1] * (weight.dim() - 2)).to(weight.device)


def masks_of(model: nn.Module) -> dict[str, ConnectionMask]:
    """Return the masks of a model by the name of the weight, of a dense model none."""
    return {
        f"{path}.{name}" if path else name: parametrization
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name, parametrizations in cast(nn.ModuleDict, module.parametrizations).items()
        for parametrization in cast(nn.ModuleList, parametrizations)
        if isinstance(parametrization, ConnectionMask)
    }


def parameter_behind_mask(model: nn.Module, name: str) -> Tensor:
    """Return the parameter behind a masked weight of that name."""
    owner, _, leaf = name.rpartition(".")
    parametrizations = cast(nn.ModuleDict, model.get_submodule(owner).parametrizations)
    return cast(Tensor, parametrizations[leaf].original)


def register_masks(model: nn.Module, connections: Mapping[str, Connections]) -> None:
    """Register a mask at each of the weights; the model itself is changed."""
    for name, weight_connections in connections.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = cast(Tensor, getattr(module, leaf))
        parametrize.register_parametrization(
            module, leaf, ConnectionMask(weight, weight_connections)
        )


def make_permanent(model: nn.Module) -> nn.Module:
    """Make the zeros part of the weights and take the masks out; the model itself is changed and returned.

    Its parameters have the names that they had before `connect_sparsely`, and nothing holds their zeros
    any longer.
    """
    for name in masks_of(model):
        owner, _, leaf = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(owner), leaf)
    return model


def connect_sparsely(
    model: nn.Module,
    fraction: float = 0.25,
    example_inputs: Any = None,
    *,
    pattern: PatternName = "random",
    share: int = 32,
    seed: int = 0,
    first: bool = False,
    data: Any = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Return a copy of a model whose convolutions have a fraction of their connections, ready to train.

    A connection is a whole window: one input channel to one filter. Masks hold those that are off at
    zero, as parametrizations of `torch.nn.utils.parametrize`: while they are there the state dict names
    a weight `parametrizations.weight.original`; `make_permanent` gives the old names back.

    Filters that no output depends on have no connections at all. There are none unless the fraction is so
    small that all filters together cannot reach all channels.

    Source: The Power of Sparsity in Convolutional Neural Networks (arXiv 1702.06257), with share=1;
    runtimes gain from blocks of 32 filters and more that read the same channels.

    Args:
        model: an nn.Module or fx.GraphModule; it is not changed.
        fraction: of the channels before it that each filter reads, rounded up; 0 < fraction <= 1.
        example_inputs: as everywhere; None where they can be guessed.
        pattern: which connections: "random" and "expander" (each channel read about as often) before
            training; "magnitude" and "taylor" (by loss on data) of a trained model.
        share: filters that read the same channels, at most: blocks are equally large but for one
            filter, and there are enough of them to reach all channels. In a trained model filters that
            want the same channels come together.
        seed: for chance.
        first: also the convolutions that read the model's input.
        data: batches with targets, for "taylor".
        loss: of the model's output and a batch's target, for "taylor".

    Raises:
        InvalidRequestError: no such fraction, pattern or share; or data and loss are missing.

    """
    module, inputs = normalize_model_and_inputs(model, example_inputs)
    sparse_copy = copy_with(module, lambda name, tensor: None)
    graph = Dependencies(infer(sparse_copy, inputs))
    wiring = choose_connectivity(
        sparse_copy, graph, fraction,
        pattern=pattern, share=share, seed=seed, first=first, data=data, loss=loss,
    )  # fmt: skip
    register_masks(sparse_copy, wiring.connections(fraction))
    return sparse_copy
