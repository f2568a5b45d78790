"""Matrices that are zero but for some blocks, held and multiplied without the rest.

Source: Narang et al., Block-Sparse Recurrent Neural Networks (arXiv 1711.02782), for blocks as what
runs fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

Block = tuple[int, int]
"""Rows and columns of what is zero or not together."""

LEAST_ROWS = 8  # of a block: fewer keep a processor's lanes idle
LARGEST_PACKED_SHARE = 0.75  # of a matrix, packed: more is not worth the way
MANY_ZEROS = 0.5  # of a matrix: fewer are chance


@dataclass(frozen=True)
class Packed:
    """The blocks of a matrix that are not zero, as many in each row of blocks.

    Gates stand one above the other in the matrix. Where a gate's last block is short, rows of zeros make
    it whole; rows of blocks that have fewer than another keep some zeros.

    Attributes:
        blocks: by row of blocks, those of it side by side, `[rows of blocks, rows, columns]`.
        places: which run of columns each stands for, `[rows of blocks * blocks in each]`, int64.

    """

    blocks: Tensor
    places: Tensor

    @classmethod
    def of(cls, matrix: Tensor, gates: int, block: Block) -> Packed:
        """Pack a matrix, `[gates * height, width]`; a block of a width that does not fit is cut up."""
        rows, columns = block[0], gcd(block[1], matrix.shape[1])
        # [gates, height, width], then with rows of zeros until the height is whole blocks
        by_gate = matrix.unflatten(0, (gates, -1))
        by_gate = F.pad(by_gate, (0, 0, 0, -by_gate.shape[1] % rows))
        # [rows of blocks, rows, blocks across, columns]
        by_block = by_gate.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).flatten(0, 1)
        is_on = (by_block != 0).any(3).any(1)  # [rows of blocks, blocks across]
        # Sorted by whether they are zero, blocks that are not come first: of 0 1 0 1, places 1 3 0 2;
        # the first two, in the order of the matrix again. A row with fewer keeps some that are zero.
        count = max(1, int(is_on.sum(1).max()))
        places = (~is_on).byte().argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        # [rows of blocks, kept blocks, rows, columns] -> [rows of blocks, rows, kept blocks * columns]
        kept_blocks = by_block.transpose(1, 2).take_along_dim(places[:, :, None, None], 1)
        return cls(kept_blocks.transpose(1, 2).flatten(2).contiguous(), places.flatten())


def find_block(matrix: Tensor, gates: int) -> Block:
    """Return the largest block, rows and columns, whose edges are where the zeros of a matrix change.

    Rows count within their gate. The block is one by one where zeros stand alone.
    """
    is_on = (matrix != 0).unflatten(0, (gates, -1))  # [gates, height, width]
    row_changes = (is_on[:, 1:] != is_on[:, :-1]).any(2).any(0)
    column_changes = (is_on[:, :, 1:] != is_on[:, :, :-1]).any(1).any(0)
    # The height is no edge, since a gate's last block may be short; the width is, and is divided.
    row_edges = (
        (0, is_on.shape[1])
        if not row_changes.any()
        else (row_changes.nonzero().flatten() + 1).tolist()
    )
    column_edges = (column_changes.nonzero().flatten() + 1).tolist()
    return gcd(*row_edges), gcd(*column_edges, is_on.shape[2])


def product(blocks: Tensor, places: Tensor | None, data: Tensor) -> Tensor:
    """Multiply a packed matrix, on the left, with a matrix.

    Args:
        blocks: of `Packed`, or a matrix whole, `[rows, width]`.
        places: of `Packed`; None with a matrix that is whole.
        data: `[width, count]`.

    Returns:
        `[rows of blocks * rows, count]`, a gate's rows of padding included.

    """
    if places is None:
        return blocks @ data
    # [runs, columns, count] -> [rows of blocks, kept blocks * columns, count]
    runs = data.unflatten(0, (-1, columns_per_block(blocks, places)))
    gathered = runs.index_select(0, places).reshape(len(blocks), -1, data.shape[1])
    return torch.bmm(blocks, gathered).flatten(0, 1)


def columns_per_block(blocks: Tensor, places: Tensor) -> int:
    """Return how many columns each block has."""
    return blocks.shape[2] * len(blocks) // len(places)


def pack_if_smaller(matrix: Tensor, gates: int, block: Block | None) -> Packed | None:
    """Return a matrix packed in those blocks or the ones found; None where that saves little or is slow."""
    rows, columns = block or find_block(matrix, gates)
    if rows < LEAST_ROWS:
        return None
    packed = Packed.of(matrix, gates, (rows, columns))
    return packed if packed.blocks.numel() <= LARGEST_PACKED_SHARE * matrix.numel() else None


def has_zeros(matrix: Tensor) -> bool:
    """Say whether so many weights are zero that it is no chance."""
    return float((matrix == 0).float().mean()) >= MANY_ZEROS
