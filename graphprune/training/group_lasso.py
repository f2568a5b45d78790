"""A penalty on whole channels: training with it empties some, so that cutting them costs little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.errors import InvalidRequestError
from graphprune.groups.groups import Dependencies
from graphprune.inference.infer import infer
from graphprune.masks import slots_of
from graphprune.utils.tensors import named_tensors


class GroupLasso:
    """The sum over channels of the Euclidean norm of all weights that a channel runs through.

    To be added to a loss: `loss = loss_of(model(x), y) + strength * lasso()`. Each norm is weighted by
    the square root of the number of its weights. Only channels that a cut can take are counted.

    Source: Wen et al., Learning structured sparsity in deep neural networks, section 3.1 (arXiv
    1608.03665), here over the groups of the dependency graph instead of filters of one layer.

    Raises:
        InvalidRequestError: the model has no channels that can be removed.

    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        module, inputs = normalize_model_and_inputs(model, example_inputs)
        graph = Dependencies(infer(module, inputs))
        self.groups = {g.name: g.size for g in graph.groups if g.exact and not g.inner}
        if not self.groups:
            raise InvalidRequestError(
                "no channels of this model can be removed, so there is none to empty; "
                "print(graphprune.analyze(model, inputs)) says why for every dimension"
            )
        tensors = named_tensors(module)
        # by tensor and dimension: group, and the slot of each position along it (size: none)
        self._places: list[tuple[Tensor, int, str, Tensor]] = []
        counts = {name: torch.zeros(size + 1) for name, size in self.groups.items()}
        for name, size in self.groups.items():
            for member in graph.by_name[name].members:
                if member.parameter not in graph.inference.trainable:
                    continue
                tensor = tensors[member.parameter]
                for slots in slots_of(member.layout, graph.by_name[name].axis):
                    slot_index = torch.from_numpy(slots)
                    # slot -1, of other groups, counts as one channel more, which `[:-1]` leaves out
                    slot_index = torch.where(slot_index < 0, size, slot_index).to(tensor.device)
                    self._places.append((tensor, member.dim, name, slot_index))
                    per_position = tensor.numel() // max(1, len(slot_index))
                    counts[name].index_add_(
                        0, slot_index.cpu(), torch.full((len(slot_index),), float(per_position))
                    )
        self._weights = {name: count[:-1].sqrt() for name, count in counts.items()}

    def norms(self) -> Mapping[str, Tensor]:
        """Return, by group name, the norm of each channel's weights, `[channels]`."""
        squares: dict[str, Tensor] = {}
        for tensor, dim, name, slot_index in self._places:
            other_dims = [d for d in range(tensor.dim()) if d != dim]
            position_squares = tensor.square().sum(other_dims) if other_dims else tensor.square()
            # `[positions]` -> `[channels + 1]`
            total = position_squares.new_zeros(self.groups[name] + 1).index_add(
                0, slot_index, position_squares
            )
            squares[name] = squares[name] + total if name in squares else total
        # the smallest number keeps the gradient of a channel that is empty finite
        return {
            name: (sums[:-1] + torch.finfo(sums.dtype).tiny).sqrt()
            for name, sums in squares.items()
        }

    def __call__(self) -> Tensor:
        """Return the penalty, with a gradient for the model's parameters."""
        return torch.stack(
            [(norms * self._weights[name].to(norms)).sum() for name, norms in self.norms().items()]
        ).sum()
