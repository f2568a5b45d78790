"""Random networks, described by a short list that prints, shrinks and replays.

A network is a kind of data ("image", "sequence", "vector"), a width, and a list of blocks, each a
name and a number that settles its details. Sizes stand in the code of about half of the blocks.
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

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return the network, always the same, and its input at batch 2."""
        torch.manual_seed(0)
        x = INPUTS[self.kind]()
        stem, names, head = KINDS[self.kind]
        layers, width = [stem(self.width)], self.width
        for name, detail in self.blocks:
            block = names[name if width > 1 else next(iter(names))](width, detail)
            layers.append(block)
            width = block.width
        model = nn.Sequential(*layers, head(width, len(self.blocks)))
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


def image_head(width: int, detail: int) -> nn.Module:
    if detail % 2:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 7))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7))


IMAGE: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (conv, grouped, depthwise, transposed, residual, dense, shuffle, split_and_swap, halves,
              sliced, written, padded, squeeze_excite, pixel_shuffle, normed, channels_last_norm, masked,
              twice, resampled, scaled, stacked, maxout)
}  # fmt: skip
VECTOR: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (linear, gated, regrouped, summed, joined, layer_norm, batch_normed)
}  # fmt: skip
SEQUENCE: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (linear, gated, attention, fused_attention, multihead, layer_norm, convolved, recurrent,
              channel_mixed, regrouped, summed, joined)
}  # fmt: skip
KINDS = {
    "image": (lambda width: nn.Conv2d(3, width, 3, padding=1), IMAGE, image_head),
    "sequence": (lambda width: nn.Embedding(11, width), SEQUENCE, lambda w, _: nn.Linear(w, 7)),
    "vector": (lambda width: nn.Linear(6, width), VECTOR, lambda w, _: nn.Linear(w, 7)),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "image": lambda: torch.randn(2, 3, 4, 4),
    "sequence": lambda: torch.randint(11, (2, 5)),
    "vector": lambda: torch.randn(2, 6),
}
