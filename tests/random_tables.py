"""Blocks of random networks that read a part of a table, as long as their input or by a number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.random_blocks import Block

ROWS = 24

Read = Callable[[Tensor, int], Tensor]

# From a table [row, channel] and the length t of a sequence to what is added to it, [t or 1, channel].
READS_BY_LENGTH: dict[str, Read] = {
    "first": lambda table, t: table[:t],
    "last": lambda table, t: table[-t:],
    "behind": lambda table, t: table[t : 2 * t],
    "from_the_end": lambda table, t: table[ROWS - t :],
    "all_but": lambda table, t: table[: -(ROWS - t)],
    "narrowed": lambda table, t: table.narrow(0, ROWS - t, t),
    "every_other": lambda table, t: table[::2][:t],
    "one": lambda table, t: table[t],
    "last_of_them": lambda table, t: table[:t][-1],
    "split": lambda table, t: table.split([t, ROWS - t])[0],
    "scaled": lambda table, t: (table * 2)[:t],
    "turned": lambda table, t: table.t()[:, :t].t(),
    "copied": lambda table, t: table.clone().contiguous()[:t],
    "looked_up": lambda table, t: table[torch.arange(t)],
    "selected": lambda table, t: table.index_select(0, torch.arange(t)),
    "strided": lambda table, t: table.as_strided((t, table.shape[1]), (table.shape[1], 1)),
    "bag": lambda table, t: table[:t].sum(0),
    "bag_of_most": lambda table, t: table[: 5 * t].sum(0),
    "gram": lambda table, t: (table[:t].t() @ table[:t]).sum(0),
    "relative": lambda table, t: table[distances(t) + 10].mean(1),
    "rotated": lambda table, t: torch.cat([table[:t].cos()[:1], table[1:t].sin()]),
    "by_number": lambda table, t: table[:7].sum(0) + table[9:11].sum(0),
}


def distances(length: int) -> Tensor:
    """Return how far each position is from each other one, at most ten either way."""
    at = torch.arange(length)
    return (at[:, None] - at[None]).clamp(-10, 10)


def table(width: int, detail: int) -> Block:
    read = list(READS_BY_LENGTH.values())[detail % len(READS_BY_LENGTH)]
    return Block(lambda m, x: x + read(m.table, x.shape[1]), width, table=torch.randn(ROWS, width))


def masked_scores(width: int, detail: int) -> Block:
    """Attention under a mask of which a corner is read, with a bias of each row."""

    def forward(m: Block, x: Tensor) -> Tensor:
        t = x.shape[1]
        scores = x @ x.transpose(1, 2) + m.bias[:t, None]
        mixed = scores.masked_fill(m.mask[:t, :t] == 0, -9.0).softmax(-1) @ x
        return x + mixed * m.scale[:, :t].t() if detail % 2 else x + mixed

    block = Block(forward, width, bias=torch.randn(ROWS), scale=torch.randn(width, ROWS))
    block.register_buffer("mask", torch.ones(ROWS, ROWS).tril())
    return block


def table_of_the_batch(width: int, detail: int) -> Block:
    return Block(lambda m, x: x * m.table[: x.shape[0]], width, table=torch.randn(8, width))


def positions_of_an_image(width: int, detail: int) -> Block:
    def forward(m: Block, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if detail % 3 == 0:
            return x + m.whole[:, :h, :w]
        if detail % 3 == 1:
            return x * (m.row[:, -h:, None] + m.column[:, None, :w])
        return x + m.row[:, :h].sum(1)[:, None, None] * m.column[:, w][:, None, None]

    return Block(forward, width, whole=torch.randn(width, ROWS, ROWS),
                 row=torch.randn(width, ROWS), column=torch.randn(width, ROWS))  # fmt: skip
