"""Weights of recurrent and linear layers that become zero while a model trains, a few at a time.

Source: Narang et al., Exploring Sparsity in Recurrent Neural Networks, section 3 (arXiv 1704.05119); for
blocks, Narang et al., Block-Sparse Recurrent Neural Networks, section 3.1 (arXiv 1711.02782).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError
from graphprune.state import parameter_names

Schedule: TypeAlias = Literal["threshold", "cubic", "hard"]
Kind: TypeAlias = Literal["recurrent", "linear"]

_QUANTILE = 0.9  # of the weights of a dense model, where the threshold ends; the paper's section 3.2


@dataclass(frozen=True)
class Blocks:
    """A matrix divided into blocks, those at the ends smaller; gates stand one above the other.

    Attributes:
        gates: matrices in one, of equal height; no block is in two of them.
        rows: of a block.
        columns: of a block.

    """

    gates: int
    rows: int
    columns: int

    def scores(self, weight: Tensor) -> Tensor:
        """Return the largest absolute weight of each block, `[gates, blocks down, blocks across]`."""
        by_gate = weight.detach().abs().unflatten(0, (self.gates, -1)).unsqueeze(1)
        window = (self.rows, self.columns)
        return nn.functional.max_pool2d(by_gate, window, window, ceil_mode=True).squeeze(1)

    def spread(self, blocks: Tensor, weight: Tensor) -> Tensor:
        """Return what is given of each block for each of its weights."""
        height, width = len(weight) // self.gates, weight.shape[1]
        down = blocks.repeat_interleave(self.rows, 1)[:, :height]
        return down.repeat_interleave(self.columns, 2)[:, :, :width].flatten(0, 1)
