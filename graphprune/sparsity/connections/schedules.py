"""Connections that change while a model trains: more and more of them, or better ones instead of worse."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.errors import InvalidRequestError
from graphprune.groups.groups import Dependencies
from graphprune.inference.infer import infer
from graphprune.sparsity.connections.connectivity import (
    PatternName,
    check_fraction,
    choose_connectivity,
)
from graphprune.sparsity.connections.parametrization import (
    ConnectionMask,
    masks_of,
    parameter_behind_mask,
    register_masks,
)
from graphprune.sparsity.connections.sites import Connections
from graphprune.utils.tensors import copy_with, named_tensors

NewWeights: TypeAlias = Literal["initial", "zero"]


class IncrementalConnections:
    """Trains a model with few connections first, and multiplies their number every so many steps.

    What is on stays on. Train `model`, and call `step` after each step of the optimiser.

    Source: The Power of Sparsity in Convolutional Neural Networks, incremental training (arXiv
    1702.06257): from 1 % or 0.1 % of the connections, doubled every 10,000, 25,000 or
    50,000 steps, until all are on. How new weights start is not said there.

    Attributes:
        model: the copy of the given model to train.
        fraction: of the connections that are on now.
        steps: how many were taken.

    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        every: int,
        start: float = 0.01,
        end: float = 1.0,
        factor: float = 2.0,
        new_weights: NewWeights = "initial",
        pattern: PatternName = "random",
        share: int = 1,
        seed: int = 0,
        first: bool = False,
    ) -> None:
        """Make the copy, with the first connections on.

        Args:
            model: an nn.Module or fx.GraphModule; it is not changed.
            example_inputs: as everywhere; None where they can be guessed.
            every: steps from one growth to the next.
            start: fraction of the connections that are on at first, above 0.
            end: fraction at which growth ends, 1 at most.
            factor: by which the fraction grows, above 1.
            new_weights: what a connection starts with when it comes on: its "initial" weight, from
                which an optimiser's weight decay may have taken, or "zero".
            pattern: as for `connect_sparsely`, without data.
            share: as for `connect_sparsely`.
            seed: for chance.
            first: also the convolutions that read the model's input.

        Raises:
            InvalidRequestError: an argument is none of these.

        """
        check_fraction(start)
        check_fraction(end)
        if start > end or factor <= 1 or every < 1:
            raise InvalidRequestError(
                f"start={start}, end={end}, factor={factor} and every={every} must let the connections "
                "grow: start no larger than end, factor above 1, every 1 or more"
            )
        if new_weights not in get_args(NewWeights):
            raise InvalidRequestError(
                f"new_weights={new_weights!r} is neither 'initial' nor 'zero'"
            )
        module, inputs = normalize_model_and_inputs(model, example_inputs)
        self.model = copy_with(module, lambda name, tensor: None)
        graph = Dependencies(infer(self.model, inputs))
        self._wiring = choose_connectivity(
            self.model, graph, start, pattern=pattern, share=share, seed=seed, first=first
        )
        self.every, self.start, self.end, self.factor = every, start, end, factor
        self.steps = 0
        on = self._wiring.connections(start)
        if new_weights == "zero":
            # in the parameters, which masks only hide: else connections come on with what these hold
            _silence(self.model, on)
        register_masks(self.model, on)

    @property
    def fraction(self) -> float:
        """Fraction of the connections that are on after the steps taken."""
        return min(self.end, self.start * self.factor ** (self.steps // self.every))

    def step(self) -> bool:
        """Count a step of the optimiser; return whether connections came on."""
        before = self.fraction
        self.steps += 1
        if self.fraction > before:
            self._connect()
        return self.fraction > before

    def _connect(self) -> None:
        masks = masks_of(self.model)
        for name, on in self._wiring.connections(self.fraction).items():
            masks[name].connect(on)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` of a schedule made with the same arguments goes on from."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the model's own state is loaded by itself."""
        self.steps = int(state["steps"])
        self._connect()


def _silence(model: nn.Module, connections: dict[str, Connections]) -> None:
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, on in connections.items():
            tensors[name][torch.from_numpy(~on).to(tensors[name].device)] = 0.0


class DropAndGrow:
    """Learns which connections to have: the weakest go every so many steps, others come in their place.

    Of each block of filters that share their channels, a fraction of the connections with the smallest
    weights goes, and as many come on where the derivative of the loss is largest, starting from zero.
    The fraction falls along a cosine to zero at `until`. Call `step` after each step of the optimiser; the
    derivative is that of the last backward pass before it.

    Source: Evci et al., Rigging the Lottery (arXiv 1911.11134), here for whole connections.

    Attributes:
        steps: how many were taken.

    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, until: int, fraction: float = 0.3
    ) -> None:
        """Watch a model.

        Args:
            model: made by `connect_sparsely`; its connections will change.
            every: steps from one exchange to the next.
            until: the step at which the last exchange has been.
            fraction: of the connections that the first exchange concerns, above 0 and below 1.

        Raises:
            InvalidRequestError: the model has no sparse connections, or an argument is none of these.

        """
        self._masks = masks_of(model)
        if not self._masks:
            raise InvalidRequestError(
                f"{type(model).__name__} has no sparse connections to exchange; make it by "
                "graphprune.connect_sparsely"
            )
        if not 0 < fraction < 1 or every < 1 or until < 1:
            raise InvalidRequestError(
                f"fraction={fraction} must be above 0 and below 1, every={every} and until={until} "
                "numbers of steps"
            )
        self._weights = {name: parameter_behind_mask(model, name) for name in self._masks}
        self._blocks = {
            name: _blocks(connection_mask.connections)
            for name, connection_mask in self._masks.items()
        }
        self.every, self.until, self.fraction = every, until, fraction
        self.steps = 0
        self._watch()

    def step(self) -> bool:
        """Count a step of the optimiser; return whether connections were exchanged."""
        self.steps += 1
        is_due = self._is_due(self.steps)
        if is_due:
            fraction = self.fraction / 2 * (1 + math.cos(math.pi * self.steps / self.until))
            for name, connection_mask in self._masks.items():
                if connection_mask.gradient is not None:
                    _exchange(connection_mask, self._weights[name], self._blocks[name], fraction)
        self._watch()
        return is_due

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` of a schedule made with the same arguments goes on from."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the model's own state is loaded first, then the schedule made."""
        self.steps = int(state["steps"])
        self._watch()

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 and step < self.until

    def _watch(self) -> None:
        """Have the masks note derivatives in the next step, if an exchange follows it."""
        for connection_mask in self._masks.values():
            # the flag is read in the forward pass, which comes before the step that uses the derivative
            connection_mask.watched, connection_mask.gradient = self._is_due(self.steps + 1), None


def _blocks(on: Connections) -> list[Tensor]:
    """Return the filters of each block that reads the same channels; those that read none have no block."""
    # flat, since versions of numpy differ in its shape
    _, block_of = np.unique(on, axis=0, return_inverse=True)
    blocks = [np.flatnonzero(block_of.flatten() == block) for block in range(block_of.max() + 1)]
    return [torch.from_numpy(filters) for filters in blocks if on[filters[0]].any()]


@torch.no_grad()
def _exchange(
    connection_mask: ConnectionMask, weight: Tensor, blocks: list[Tensor], fraction: float
) -> None:
    """Exchange a part of each block's connections, the weakest for those with the largest derivatives."""
    assert connection_mask.gradient is not None
    magnitudes = weight.abs().flatten(2).sum(2)
    derivatives = connection_mask.gradient.abs().flatten(2).sum(2)
    on = torch.from_numpy(connection_mask.connections)
    is_new = torch.zeros_like(on)
    for filters in blocks:
        # `[inputs]`: the filters of a block read the same channels, so the first speaks for all
        is_on = on[filters[0]]
        count = min(int(fraction * int(is_on.sum())), int((~is_on).sum()))
        if count:
            weakest = (
                magnitudes[filters]
                .sum(0)
                .cpu()
                .masked_fill(~is_on, math.inf)
                .topk(count, largest=False)
            )
            strongest = derivatives[filters].sum(0).cpu().masked_fill(is_on, -math.inf).topk(count)
            on[filters.unsqueeze(1), weakest.indices] = False
            on[filters.unsqueeze(1), strongest.indices] = True
            is_new[filters.unsqueeze(1), strongest.indices] = True
    # the parameter behind the mask still has what it had when its connection went off
    weight[is_new.to(weight.device)] = 0.0
    connection_mask.connect(on.numpy())
