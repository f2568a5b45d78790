"""Blocks and heads of random networks on images: [batch, channel, height, width]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_blocks import Block, divisor, in_disorder


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
    along = [lambda x: x.roll(1, 1), lambda x: x.softmax(1) * 4,
             lambda x: x.cumsum(1) / width, lambda x: x.sort(1)[0]]  # fmt: skip
    return Block(lambda m, x: m.layer(along[detail % 4](x)), 6, layer=nn.Conv2d(width, 6, 1))


def in_another_order(width: int, detail: int) -> Block:
    order = in_disorder(width)
    ways: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda m, x: m.layer(x.flip(1)),
        lambda m, x: m.layer(x[:, m.order]) + x.flip(1),
        lambda m, x: m.layer(x[:, m.order])[:, m.order.argsort()],
        lambda m, x: m.layer(x[:, order.tolist()]) * x[:, order.tolist()].sigmoid(),
        lambda m, x: torch.cat([x, m.layer(x.index_select(1, m.order))], 1).flip(1, 2)[:, :width],
        lambda m, x: torch.cat(m.layer(x.flip(1)).tensor_split(2, 1)[::-1], 1) + x.mean(1, True),
        lambda m, x: m.layer(x)[:, m.order][:, m.back].relu() + m.layer(x)[:, m.order],
        lambda m, x: m.layer(x[:, m.order]) + m.order.view(-1, 1, 1) / width,
    ]
    block = Block(ways[detail % 8], width, layer=nn.Conv2d(width, width, 1))
    block.register_buffer("order", order)
    block.register_buffer("back", order.argsort() - width * (detail % 3 == 0))
    return block


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


def windowed(width: int, detail: int) -> Block:
    """Attend within windows of two by two that are cut out of the image, rolled by one pixel or not."""
    heads, size = 1 + detail % 3, 2 + detail % 3

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if h % 2 or w % 2:
            return x
        moved = x.roll((1, 1), (2, 3)) if detail % 5 < 2 else x
        rows = moved.view(b, width, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        rows = rows.reshape(-1, 4, width)
        q, k, v = m.qkv(rows).unflatten(2, (3, heads, size)).permute(2, 0, 3, 1, 4)
        rows = m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        rows = rows.view(b, h // 2, w // 2, 2, 2, width).permute(0, 5, 1, 3, 2, 4)
        return x + rows.reshape(x.shape)

    return Block(forward, width, qkv=nn.Linear(width, 3 * heads * size),
                 out=nn.Linear(heads * size, width))  # fmt: skip


def overlaid(width: int, detail: int) -> Block:
    """Mix the windows of an image as columns and add them up again."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        if detail % 2:
            return m.layer(columns).unflatten(2, x.shape[2:]).relu()
        weighted = columns.unflatten(1, (-1, 9)) * m.scale
        return F.fold(weighted.flatten(1, 2), x.shape[2:], 3, padding=1)

    return Block(forward, width, layer=nn.Conv1d(9 * width, width, 1), scale=torch.randn(9, 1))


def gathered(width: int, detail: int) -> Block:
    """Let a few learned queries attend to all positions, and every position to their answers."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        seen = (m.queries @ m.key(rows).transpose(1, 2)).softmax(-1) @ rows
        back = (rows @ seen.transpose(1, 2)).sigmoid() @ seen
        return (x.flatten(2) + back.transpose(1, 2)).view(x.shape)

    inner = 3 + detail % 4
    return Block(forward, width, queries=torch.randn(1, 3, inner), key=nn.Linear(width, inner))


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


IMAGE: dict[str, Callable[[int, int], Block]] = {
    f.__name__: f
    for f in (conv, grouped, depthwise, transposed, residual, dense, shuffle, split_and_swap, halves,
              sliced, written, padded, squeeze_excite, pixel_shuffle, normed, channels_last_norm, masked,
              twice, resampled, scaled, stacked, maxout, projected, inception, linear_unit,
              three_pieces, interleaved, every_other, in_order, in_another_order, space_to_depth,
              spatial_gate, gram, windowed, overlaid, gathered)
}  # fmt: skip
IMAGE_HEADS = (pooled(1), pooled(2), written_out, two_maps)
