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

Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """Layers, and a function of them and the data."""

    def __init__(self, forward: Forward, width: int, **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        self.width = width
        for name, layer in layers.items():
            if isinstance(layer, Tensor):
                self.register_parameter(name, nn.Parameter(layer))
            else:
                self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


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


def divisor(width: int, detail: int) -> int:
    """Return one of the divisors of a width."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return divisors[detail % len(divisors)]


# Images: [batch, channel, height, width]


def conv(width: int, detail: int) -> Block:
    out = 4 + detail % 13
    kernel = 1 + 2 * (detail % 2)
    layer = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=detail % 3 > 0)
    norm = nn.BatchNorm2d(out)
    return Block(lambda m, x: F.relu(m.norm(m.layer(x))), out, layer=layer, norm=norm)


def grouped(width: int, detail: int) -> Block:
    groups = divisor(width, detail)
    layer = nn.Conv2d(width, groups * (1 + detail % 3), 3, padding=1, groups=groups)
    return Block(lambda m, x: F.silu(m.layer(x)), layer.out_channels, layer=layer)


def depthwise(width: int, detail: int) -> Block:
    layer = nn.Conv2d(width, width * (1 + detail % 2), 3, padding=1, groups=width)
    return Block(lambda m, x: m.act(m.layer(x)), layer.out_channels, layer=layer,
                 act=nn.PReLU(layer.out_channels))  # fmt: skip


def transposed(width: int, detail: int) -> Block:
    groups = divisor(width, detail) if detail % 2 else 1
    layer = nn.ConvTranspose2d(width, groups * 4, 3, padding=1, groups=groups)
    return Block(lambda m, x: F.gelu(m.layer(x)), groups * 4, layer=layer)


def residual(width: int, detail: int) -> Block:
    inner = 3 + detail % 9
    return Block(lambda m, x: F.relu(x + m.b(F.relu(m.a(x)))), width,
                 a=nn.Conv2d(width, inner, 1), b=nn.Conv2d(inner, width, 3, padding=1))  # fmt: skip


def dense(width: int, detail: int) -> Block:
    grown = 2 + detail % 5
    return Block(lambda m, x: torch.cat([x, m.a(x), m.b(x)], 1), width + 2 * grown,
                 a=nn.Conv2d(width, grown, 1), b=nn.Conv2d(width, grown, 3, padding=1))  # fmt: skip


def shuffle(width: int, detail: int) -> Block:
    groups = divisor(width, detail)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if detail % 2:
            return x.view(b, groups, width // groups, h, w).transpose(1, 2).reshape(b, width, h, w)
        return x.view(b, groups, c // groups, h, w).transpose(1, 2).flatten(1, 2)

    return Block(forward, width)


def split_and_swap(width: int, detail: int) -> Block:
    at = 1 + detail % (width - 1)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.split([at, width - at], 1)
        return torch.cat([b * 2, a.relu()], 1)

    return Block(forward, width)


def halves(width: int, detail: int) -> Block:
    if width % 2:
        return conv(width, detail)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * b.sigmoid() if detail % 2 else torch.cat([a, m.layer(b)], 1)

    half = width // 2
    return Block(forward, half if detail % 2 else width, layer=nn.Conv2d(half, half, 1))


def sliced(width: int, detail: int) -> Block:
    at = 1 + detail % (width - 1)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([m.layer(x[:, :at]), x[:, at:]], 1)

    return Block(forward, width, layer=nn.Conv2d(at, at, 1))


def written(width: int, detail: int) -> Block:
    at = 1 + detail % (width - 1)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :at] = m.layer(x)
        return y + x

    return Block(forward, width, layer=nn.Conv2d(width, at, 1))


def padded(width: int, detail: int) -> Block:
    more = 1 + detail % 5
    out = width + more + detail % 3
    return Block(lambda m, x: F.pad(x, (0, 0, 0, 0, detail % 3, more)) + m.layer(x),
                 out, layer=nn.Conv2d(width, out, 1))  # fmt: skip


def squeeze_excite(width: int, detail: int) -> Block:
    inner = 2 + detail % 4

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.b(F.relu(m.a(x.mean((2, 3))))))
        return x * (gate.view(-1, width, 1, 1) if detail % 2 else gate[:, :, None, None])

    return Block(forward, width, a=nn.Linear(width, inner), b=nn.Linear(inner, width))


def pixel_shuffle(width: int, detail: int) -> Block:
    return Block(lambda m, x: F.max_pool2d(F.pixel_shuffle(m.layer(x), 2), 2), 5,
                 layer=nn.Conv2d(width, 20, 1))  # fmt: skip


def normed(width: int, detail: int) -> Block:
    norms = [
        nn.GroupNorm(divisor(width, detail), width),
        nn.InstanceNorm2d(width, affine=True),
        nn.GroupNorm(1, width),
        nn.BatchNorm2d(width),
    ]
    return Block(lambda m, x: F.relu(m.norm(x)), width, norm=norms[detail % 4])


def channels_last_norm(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), width,
                 norm=nn.LayerNorm(width))  # fmt: skip


def masked(width: int, detail: int) -> Block:
    return Block(lambda m, x: x * m.mask(x).sigmoid(), width, mask=nn.Conv2d(width, 1, 1))


def twice(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(F.relu(m.layer(x))), width, layer=nn.Conv2d(width, width, 1))


def resampled(width: int, detail: int) -> Block:
    if detail % 2:
        return Block(lambda m, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), width)
    return Block(lambda m, x: F.interpolate(x, size=(4, 4), mode="bilinear"), width)


def scaled(width: int, detail: int) -> Block:
    shape = (1, width, 1, 1) if detail % 2 else (width, 1, 1)
    return Block(lambda m, x: x * m.scale + m.shift, width,
                 scale=torch.randn(shape), shift=torch.randn(shape))  # fmt: skip


def stacked(width: int, detail: int) -> Block:
    return Block(lambda m, x: torch.stack([m.a(x), m.b(x)], 1).amax(1), width,
                 a=nn.Conv2d(width, width, 1), b=nn.Conv2d(width, width, 1))  # fmt: skip


def maxout(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return m.layer(x).view(b, width, 2, h, w).amax(2)

    return Block(forward, width, layer=nn.Conv2d(width, 2 * width, 1))


def projected(width: int, detail: int) -> Block:
    out, stride = 4 + detail % 11, 1 + detail % 2

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.b(F.relu(m.a(x)))) + m.skip(x)
        return F.interpolate(F.relu(y), scale_factor=stride)

    return Block(forward, out, a=nn.Conv2d(width, 5, 1), norm=nn.BatchNorm2d(out),
                 b=nn.Conv2d(5, out, 3, padding=1, stride=stride),
                 skip=nn.Conv2d(width, out, 1, stride=stride, bias=False))  # fmt: skip


def inception(width: int, detail: int) -> Block:
    sizes = [2 + detail % 3, 3 + detail % 4, 1 + detail % 5]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        branches = [m.a(x), m.b(x), m.c(F.max_pool2d(x, 3, 1, 1))]
        return F.relu(torch.cat([*branches, x] if detail % 2 else branches, 1))

    return Block(forward, sum(sizes) + width * (detail % 2), a=nn.Conv2d(width, sizes[0], 1),
                 b=nn.Conv2d(width, sizes[1], 3, padding=1),
                 c=nn.Conv2d(width, sizes[2], 1))  # fmt: skip


def linear_unit(width: int, detail: int) -> Block:
    out = 3 + detail % 7
    return Block(lambda m, x: F.glu(m.layer(x), 1), out, layer=nn.Conv2d(width, 2 * out, 1))


def three_pieces(width: int, detail: int) -> Block:
    if width < 4:
        return conv(width, detail)
    sizes = [1, width // 2, width - width // 2 - 1]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if detail % 2:
            a, b, c = x.split(sizes, 1)
        else:
            a, b, c = x[:, :1], x[:, 1:-(sizes[2])], x[:, -(sizes[2]):]  # fmt: skip
        return torch.cat([c.sigmoid(), m.layer(b), a], 1)

    return Block(forward, width, layer=nn.Conv2d(sizes[1], sizes[1], 1))


def interleaved(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.stack([m.a(x), m.b(x)], 2 if detail % 2 else 1)
        return y.flatten(1, 2) + x.repeat_interleave(2, 1) if detail % 3 else y.flatten(1, 2)

    return Block(forward, 2 * width, a=nn.Conv2d(width, width, 1),
                 b=nn.Conv2d(width, width, 1))  # fmt: skip


def every_other(width: int, detail: int) -> Block:
    if width % 2:
        return conv(width, detail)
    return Block(lambda m, x: m.layer(x[:, ::2]) + x[:, 1::2], width // 2,
                 layer=nn.Conv2d(width // 2, width // 2, 1))  # fmt: skip


def in_order(width: int, detail: int) -> Block:
    """The order of the channels matters here: none may go."""
    along = [lambda x: x.roll(1, 1), lambda x: x.flip(1), lambda x: x.softmax(1) * 4,
             lambda x: x.cumsum(1) / width, lambda x: x.sort(1)[0]]  # fmt: skip
    return Block(lambda m, x: m.layer(along[detail % 5](x)), 6, layer=nn.Conv2d(width, 6, 1))


def space_to_depth(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if detail % 2:
            y = x.reshape(b, width, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
            y = y.reshape(b, 4 * width, h // 2, w // 2)
        else:
            y = F.pixel_unshuffle(x, 2)
        return F.interpolate(m.layer(y), scale_factor=2)

    return Block(forward, 4 + detail % 5, layer=nn.Conv2d(4 * width, 4 + detail % 5, 1))


def spatial_gate(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return m.layer(x) * m.gate(both).sigmoid()

    return Block(forward, width, layer=nn.Conv2d(width, width, 1),
                 gate=nn.Conv2d(2, 1, 3, padding=1))  # fmt: skip


def gram(width: int, detail: int) -> Block:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        flat = m.a(x).flatten(2)
        weights = (flat @ flat.transpose(1, 2) / 16).softmax(-1) if detail % 2 else None
        y = flat if weights is None else weights @ m.b(x).flatten(2)
        return y.unflatten(2, x.shape[2:]) + x

    return Block(forward, width, a=nn.Conv2d(width, width, 1), b=nn.Conv2d(width, width, 1))


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


def pooled(size: int) -> Callable[[int, int], nn.Module]:
    def head(width: int, detail: int) -> nn.Module:
        layer = nn.Linear(size * size * width, 7)
        return nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten(), layer)

    return head


def written_out(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(x.reshape(-1, 16 * width) if detail > 5 else x.flatten(1)), 7,
                 layer=nn.Linear(16 * width, 7))  # fmt: skip


def two_maps(width: int, detail: int) -> Block:
    return Block(lambda m, x: (m.a(x), m.b(x.mean((2, 3)))), 7,
                 a=nn.Conv2d(width, 2, 1), b=nn.Linear(width, 7))  # fmt: skip


def of_each(width: int, detail: int) -> nn.Module:
    return nn.Linear(width, 7)


def of_the_mean(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(x.mean(1)), 7, layer=nn.Linear(width, 7))


def of_the_last(width: int, detail: int) -> Block:
    return Block(lambda m, x: m.layer(x[:, -1]), 7, layer=nn.Linear(width, 7))


IMAGE: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (conv, grouped, depthwise, transposed, residual, dense, shuffle, split_and_swap, halves,
              sliced, written, padded, squeeze_excite, pixel_shuffle, normed, channels_last_norm, masked,
              twice, resampled, scaled, stacked, maxout, projected, inception, linear_unit,
              three_pieces, interleaved, every_other, in_order, space_to_depth, spatial_gate, gram)
}  # fmt: skip
VECTOR: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (linear, gated, regrouped, summed, joined, layer_norm, batch_normed, tied, head_norms,
              experts, each_group, outer, parameters, unit_length, swapped)
}  # fmt: skip
SEQUENCE: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (linear, gated, attention, fused_attention, multihead, layer_norm, convolved, recurrent,
              channel_mixed, regrouped, summed, joined, directions, tied, head_norms,
              paired_rotation, context, time_mixed, experts, each_group, parameters, swapped)
}  # fmt: skip
IMAGE_HEADS = (pooled(1), pooled(2), written_out, two_maps)
SEQUENCE_HEADS = (of_each, of_the_mean, of_the_last, two_outputs)
VECTOR_HEADS = (of_each, of_each, two_outputs)
KINDS = {
    "image": (lambda width: nn.Conv2d(3, width, 3, padding=1), IMAGE, IMAGE_HEADS),
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
