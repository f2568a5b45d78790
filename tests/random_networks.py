"""Random networks, described by a short list that prints, shrinks and replays.

A network is a kind of data ("image", "sequence", "features", "vector"), a width, a list of blocks,
each a name and a number that settles its details, and a number for its head. Sizes stand in the code
of about half of the blocks, so that some networks slim as modules and some only as graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import randomise
from tests.random_blocks import Block, divisor, in_disorder
from tests.random_images import IMAGE, IMAGE_HEADS
from tests.random_tables import (
    masked_scores,
    positions_of_an_image,
    table,
    table_of_the_batch,
)


@dataclass(frozen=True)
class Network:
    """What a random network is made from."""

    kind: str
    width: int
    blocks: tuple[tuple[str, int], ...]
    ends: int = 0

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return the network, always the same, and its input at batch 2."""
        torch.manual_seed(0)
        x = INPUTS[self.kind]()
        stem, names, heads = KINDS[self.kind]
        layers, width = [stem(self.width)], self.width
        for name, detail in self.blocks:
            block = names[name if width > 1 else next(iter(names))](width, detail)
            layers.append(block)
            width = block.width
        head = heads[self.ends % len(heads)](width, self.ends)
        model = nn.Sequential(*layers, head)
        return randomise(model, (x,)).eval(), x


# Sequences: [batch, time, channel]


def linear(width: int, detail: int) -> Block:
    out = 4 + detail % 17
    return Block(
        lambda m, x: F.gelu(m.layer(x)), out, layer=nn.Linear(width, out, bias=detail % 2 > 0)
    )


def gated(width: int, detail: int) -> Block:
    inner = 3 + detail % 11

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if detail % 2:
            return x + m.down(F.silu(m.gate(x)) * m.up(x))
        a, b = m.both(x).split(inner, -1)
        return x + m.down(a * b.sigmoid())

    return Block(forward, width, gate=nn.Linear(width, inner), up=nn.Linear(width, inner),
                 both=nn.Linear(width, 2 * inner), down=nn.Linear(inner, width))  # fmt: skip


def attention(width: int, detail: int) -> Block:
    heads, size, groups = 2 + detail % 3, 2 + detail % 4, 1 + detail % 2
    wide = heads * size

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = m.q(x).view(b, t, heads * groups, size if detail % 3 else -1).transpose(1, 2)
        k, v = (part.view(b, t, -1, size).transpose(1, 2) for part in m.kv(x).split(wide, -1))
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        if detail % 5 == 0:
            weights = (q @ k.transpose(-1, -2) * size**-0.5).softmax(-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=detail % 2 == 0)
        return x + m.out(mixed.transpose(1, 2).reshape(b, t, -1))

    return Block(forward, width, q=nn.Linear(width, wide * groups), kv=nn.Linear(width, 2 * wide),
                 out=nn.Linear(wide * groups, width))  # fmt: skip


def fused_attention(width: int, detail: int) -> Block:
    heads, size = 2 + detail % 3, 2 * (1 + detail % 3)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = m.qkv(x).view(b, t, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        if detail % 2:
            q, k = (part + turned(part) * m.angle for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + m.out(mixed.transpose(1, 2).flatten(2))

    return Block(forward, width, qkv=nn.Linear(width, 3 * heads * size), angle=torch.randn(1, 1, 1),
                 out=nn.Linear(heads * size, width))  # fmt: skip


def multihead(width: int, detail: int) -> Block:
    layer = nn.MultiheadAttention(width, divisor(width, detail), batch_first=True)
    return Block(lambda m, x: x + m.layer(x, x, x, need_weights=False)[0], width, layer=layer)


def layer_norm(width: int, detail: int) -> Block:
    norm = nn.RMSNorm(width) if detail % 2 else nn.LayerNorm(width)
    return Block(lambda m, x: m.norm(x), width, norm=norm)


def convolved(width: int, detail: int) -> Block:
    out = 4 + detail % 9
    return Block(lambda m, x: m.layer(x.transpose(1, 2)).relu().transpose(1, 2), out,
                 layer=nn.Conv1d(width, out, 3, padding=1))  # fmt: skip


def recurrent(width: int, detail: int) -> Block:
    kind = (nn.LSTM, nn.GRU, nn.RNN)[detail % 3]
    hidden, layers, both = 3 + detail % 6, 1 + detail % 2, detail % 4 > 1
    layer = kind(width, hidden, layers, batch_first=True, bidirectional=both)
    return Block(lambda m, x: m.layer(x)[0], hidden * (1 + both), layer=layer)


def channel_mixed(width: int, detail: int) -> Block:
    inner = 3 + detail % 5
    return Block(lambda m, x: torch.einsum("btc,cd,de->bte", x, m.a, m.b), width,
                 a=torch.randn(width, inner), b=torch.randn(inner, width))  # fmt: skip


def regrouped(width: int, detail: int) -> Block:
    groups = divisor(width, detail)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x.view(*x.shape[:-1], groups, width // groups)
        return torch.relu(y * m.scale).flatten(-2)

    return Block(forward, width, scale=torch.randn(groups, 1))


def summed(width: int, detail: int) -> Block:
    return Block(lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0), width,
                 a=nn.Linear(width, width), b=nn.Linear(width, width))  # fmt: skip


def joined(width: int, detail: int) -> Block:
    out = 2 + detail % 7
    return Block(lambda m, x: torch.cat([m.a(x), x, m.b(x).tanh()], -1), width + 2 * out,
                 a=nn.Linear(width, out), b=nn.Linear(width, out))  # fmt: skip


def batch_normed(width: int, detail: int) -> Block:
    return Block(lambda m, x: F.relu(m.norm(x)), width, norm=nn.BatchNorm1d(width))


def directions(width: int, detail: int) -> Block:
    """Both directions, added up after a reshape, and a second recurrent layer on them."""
    hidden = 3 + detail % 5
    first = (nn.LSTM, nn.GRU)[detail % 2](width, hidden, batch_first=True, bidirectional=True)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        both = m.first(x)[0].view(b, t, 2, hidden if detail % 3 else -1)
        return m.second(both.sum(2))[0]

    return Block(forward, 4, first=first, second=nn.GRU(hidden, 4, batch_first=True))


def tied(width: int, detail: int) -> Block:
    inner = 3 + detail % 9
    return Block(lambda m, x: x + F.linear(F.gelu(F.linear(x, m.weight)), m.weight.t()), width,
                 weight=torch.randn(inner, width))  # fmt: skip


def head_norms(width: int, detail: int) -> Block:
    heads, size = 2 + detail % 3, 2 + detail % 4

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.layer(x).unflatten(-1, (heads, size) if detail % 2 else (-1, size))
        return m.out(m.norm(y).flatten(-2))

    norm = nn.LayerNorm(size) if detail % 3 else nn.RMSNorm(size)
    return Block(forward, width, layer=nn.Linear(width, heads * size), norm=norm,
                 out=nn.Linear(heads * size, width))  # fmt: skip


def paired_rotation(width: int, detail: int) -> Block:
    heads, half = 2 + detail % 2, 1 + detail % 3

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, heads, 2 * half).transpose(1, 2) for layer in (m.q, m.k, m.v)
        )
        angle = torch.arange(t)[:, None] * m.speed
        q, k = (rotated(part, angle.cos(), angle.sin()) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + m.out(mixed.reshape(b, t, 2 * heads * half))

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if detail % 2:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    wide = 2 * heads * half
    return Block(forward, width, q=nn.Linear(width, wide), k=nn.Linear(width, wide),
                 v=nn.Linear(width, wide), out=nn.Linear(wide, width),
                 speed=torch.randn(half))  # fmt: skip


def context(width: int, detail: int) -> Block:
    return Block(lambda m, x: x + m.layer(x.mean(1, keepdim=True)).tanh(), width,
                 layer=nn.Linear(width, width))  # fmt: skip


def time_mixed(width: int, detail: int) -> Block:
    return Block(lambda m, x: x + m.layer(x.transpose(1, 2)).transpose(1, 2), width,
                 layer=nn.Linear(5, 5))  # fmt: skip


def experts(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        weights = m.router(x).softmax(-1)
        made = torch.stack([m.a(x), m.b(x), m.c(x)], -2)
        if detail % 2:
            return torch.einsum("...e,...ed->...d", weights, made)
        return (weights.unsqueeze(-1) * made).sum(-2)

    return Block(forward, width, router=nn.Linear(width, 3), a=nn.Linear(width, width),
                 b=nn.Linear(width, width), c=nn.Linear(width, width))  # fmt: skip


def each_group(width: int, detail: int) -> Block:
    groups = divisor(width, detail)
    each, out = width // groups, 1 + detail % 4

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x.reshape(*x.shape[:-1], groups, each if detail % 2 else -1)
        return torch.einsum("...gi,gio->...go", y, m.weight).flatten(-2).relu()

    return Block(forward, groups * out, weight=torch.randn(groups, each, out))


def outer(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).unsqueeze(-1) * m.b(x).unsqueeze(-2)
        return m.out(y.flatten(-2) if detail % 2 else y.reshape(*x.shape[:-1], 12))

    return Block(forward, width, a=nn.Linear(width, 3), b=nn.Linear(width, 4),
                 out=nn.Linear(12, width))  # fmt: skip


def parameters(width: int, detail: int) -> Block:
    return Block(lambda m, x: (x * m.scale).relu() + m.shift, width, scale=torch.randn(width),
                 shift=torch.randn(1, width) if detail % 2 else torch.randn(width))  # fmt: skip


def unit_length(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(F.normalize(x, dim=-1) * 2), 5, layer=nn.Linear(width, 5))


def swapped(width: int, detail: int) -> Block:
    at = 1 + detail % (width - 1)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x[..., :at], x[..., at:]
        return torch.cat([m.layer(b), a.relu()], -1) if detail % 3 else torch.cat([b, a * 2], -1)

    return Block(forward, width, layer=nn.Linear(width - at, width - at))


def two_outputs(width: int, detail: int) -> Block:
    """Two layers on the last dimension, and one of them on the data as it is."""
    return Block(lambda m, x: (m.a(x), {"b": m.b(x), "raw": x} if detail % 2 else m.b(x)), 7,
                 a=nn.Linear(width, 7), b=nn.Linear(width, 3))  # fmt: skip


def of_each(width: int, detail: int) -> nn.Module:
    return nn.Linear(width, 7)


def of_the_mean(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(x.mean(1)), 7, layer=nn.Linear(width, 7))


def of_the_last(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(x[:, -1]), 7, layer=nn.Linear(width, 7))


def heads_in_the_batch(width: int, detail: int) -> Block:
    heads, size = 2 + detail % 3, 2 + detail % 4

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = m.heads(x).view(b, t, heads, size).transpose(1, 2).reshape(b * heads, t, size)
        y = y[:, detail % 2 :].mean(1) if detail % 5 else y[:, :, 1:].amax(1).repeat(1, 2)[:, :size]
        y = y.reshape(b, 1, heads * size)
        return m.out(y) + x if detail % 7 else x * y.sum(-1, keepdim=True)

    return Block(forward, width, heads=nn.Linear(width, heads * size),
                 out=nn.Linear(heads * size, width))  # fmt: skip


def in_another_order(width: int, detail: int) -> Block:
    ways: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda m, x: m.layer(x.flip(-1)) + x,
        lambda m, x: m.layer(x[..., m.order]) * x[..., m.order],
        lambda m, x: m.layer(x).index_select(-1, m.order) + x.flip(-1),
        lambda m, x: F.linear(x, m.layer.weight[m.order], m.layer.bias.flip(0)) + x,
        lambda m, x: torch.cat([m.layer(x), x.flip(-1)], -1).flip(-1),
    ]
    block = Block(ways[detail % 5], width * (1 + (detail % 5 == 4)), layer=nn.Linear(width, width))
    block.register_buffer("order", in_disorder(width))
    return block


VECTOR: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (linear, gated, regrouped, summed, joined, layer_norm, batch_normed, tied, head_norms,
              experts, each_group, outer, parameters, unit_length, swapped, table_of_the_batch,
              in_another_order)
}  # fmt: skip
SEQUENCE: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (linear, gated, attention, fused_attention, multihead, layer_norm, convolved, recurrent,
              channel_mixed, regrouped, summed, joined, directions, tied, head_norms,
              paired_rotation, context, time_mixed, experts, each_group, parameters, swapped, table,
              masked_scores, in_another_order, heads_in_the_batch)
}  # fmt: skip
SEQUENCE_HEADS = (of_each, of_the_mean, of_the_last, two_outputs)
VECTOR_HEADS = (of_each, of_each, two_outputs)
KINDS = {
    "image": (
        lambda width: nn.Conv2d(3, width, 3, padding=1),
        IMAGE | {"positions_of_an_image": positions_of_an_image},
        IMAGE_HEADS,
    ),
    "sequence": (lambda width: nn.Embedding(11, width), SEQUENCE, SEQUENCE_HEADS),
    "features": (lambda width: nn.Linear(6, width), SEQUENCE, SEQUENCE_HEADS),
    "vector": (lambda width: nn.Linear(6, width), VECTOR, VECTOR_HEADS),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "image": lambda: torch.randn(2, 3, 4, 4),
    "sequence": lambda: torch.randint(11, (2, 5)),
    "features": lambda: torch.randn(2, 5, 6),
    "vector": lambda: torch.randn(2, 6),
}
