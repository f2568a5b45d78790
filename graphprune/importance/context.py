"""What is to be scored, and by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor, nn

from graphprune.calibration.batches import Share
from graphprune.errors import InvalidRequestError
from graphprune.groups.groups import Dependencies
from graphprune.utils.safetensors_blocks import CheckpointWeights, row_blocks
from graphprune.utils.tensors import named_tensors

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""From a model's output and a batch's target to one number."""


@dataclass(frozen=True)
class ScoringContext:
    """A model whose channels are scored.

    Attributes:
        model: holds the weights; it is not changed.
        graph: the groups to score.
        batches: this process's share of the data, for criteria that look at data.
        loss: from the model's output and a batch's target to one number, for criteria that ask for it.
        seed: for chance.
        weights: the files that hold the values of a model on the meta device.

    """

    model: nn.Module
    graph: Dependencies
    batches: Share | None = None
    loss: Loss | None = None
    seed: int = 0
    weights: CheckpointWeights | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors by name."""
        return named_tensors(self.model)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the values of a parameter, a block of rows after the other.

        Raises:
            InvalidRequestError: it has none, being on the meta device.

        """
        if self.weights is not None:
            yield from self.weights.by_name[name].blocks()
            return
        values = values_of(name, self.tensors[name])
        rows = values if values.dim() else values[None]  # a scalar has no rows: it is one
        for start, stop in row_blocks(rows.shape):
            yield rows[start:stop].cpu().contiguous()

    def not_finite(self) -> list[str]:
        """Return the names of the parameters of groups that hold NaN or infinite numbers."""
        names = dict.fromkeys(m.parameter for group in self.graph.groups for m in group.members)
        return [
            name
            for name in names
            if name in self.graph.inference.trainable
            and not all(bool(block.isfinite().all()) for block in self.blocks(name))
        ]

    @property
    def data(self) -> Share:
        """The batches, of a process group the share of this process.

        Raises:
            InvalidRequestError: there are none.

        """
        if self.batches is None:
            raise InvalidRequestError(
                "this importance looks at data; pass data=[...], a list of batches or a DataLoader"
            )
        return self.batches


def values_of(name: str, parameter: Tensor) -> Tensor:
    """Return a parameter's values, without its history.

    Raises:
        InvalidRequestError: it has none, being on the meta device.

    """
    if parameter.is_meta:
        raise InvalidRequestError(
            f"{name} is on the meta device and has no values to score; use importance='random' or a "
            "function, say by weights= which files hold them, or load the weights first"
        )
    return parameter.detach()
