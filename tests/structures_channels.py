"""Small structures that move, cut, join and mix channels, or meet them with constants."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structures_registry import (
    between,
    both,
    conv,
    head,
    hidden,
    image,
    normal,
    out,
    structure,
    vector,
    wide,
)

on_channels = partial(between, inputs=image, first=wide)
on_features = partial(between, inputs=vector, first=hidden)


# -------------------------------------------------------------------------------------- shuffling


def shuffle(x: Tensor, groups: int = 4) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


on_channels("shuffle_view", function=shuffle, last=out)
on_channels(
    "shuffle_unflatten",
    function=lambda x: x.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2),
    last=out,
)
on_channels(
    "shuffle_literals",
    function=lambda x: x.reshape(-1, 4, 6, 9, 8).permute(0, 2, 1, 3, 4).reshape(-1, 24, 9, 8),
    last=out,
)
on_channels("shuffle_module", function=nn.ChannelShuffle(3), last=out)
between(
    "shuffle_between_groups",
    image,
    lambda: nn.Sequential(conv(3, 24), nn.ReLU(), conv(24, 24, groups=4)),
    shuffle,
    lambda: nn.Sequential(conv(24, 36, groups=4), nn.ReLU(), out(36)),
)
on_channels("pixel_shuffle", function=lambda x: F.pixel_shuffle(x, 2), last=partial(out, 6))
between(
    "pixel_unshuffle",
    normal(3, 8, 6),
    wide,
    lambda x: F.pixel_unshuffle(x, 2),
    partial(out, 96),
)

# ---------------------------------------------------------------------- cutting, joining, padding

on_channels(
    "split_equal",
    function=lambda x: (lambda a, b, c: a * torch.sigmoid(b) + c)(*x.split(8, 1)),
    last=partial(out, 8),
)
on_channels(
    "split_in_two", function=lambda x: torch.mul(*torch.split(x, 12, 1)), last=partial(out, 12)
)
on_channels("split_loop", function=lambda x: sum(x.split(6, dim=1)), last=partial(out, 6))
on_channels("chunk", function=lambda x: torch.maximum(*x.chunk(2, 1)), last=partial(out, 12))
on_channels(
    "chunk_uneven", function=lambda x: torch.cat(x.chunk(5, 1)[:4], 1), last=partial(out, 20)
)
on_channels("glu", function=lambda x: F.glu(x, 1), last=partial(out, 12))
on_channels("slice_first", function=lambda x: x[:, :10], last=partial(out, 10))
on_channels("slice_last", function=lambda x: x[:, 10:], last=partial(out, 14))
on_channels("slice_negative", function=lambda x: x[:, -7:], last=partial(out, 7))
on_channels("slice_step", function=lambda x: x[:, ::2], last=partial(out, 12))
on_channels("slice_overlap", function=lambda x: x[:, :15] + x[:, 9:], last=partial(out, 15))
on_channels("narrow", function=lambda x: x.narrow(1, 5, 11), last=partial(out, 11))
on_channels("select", function=lambda x: x * x[:, 3:4] + x[:, 5].unsqueeze(1), last=out)
on_channels(
    "unbind",
    function=lambda x: (lambda a, b: a - b)(*x.unflatten(1, (2, 12)).unbind(1)),
    last=partial(out, 12),
)
on_channels("cat_reordered", function=lambda x: torch.cat([x[:, 14:], x[:, :14]], 1), last=out)
on_channels("repeat", function=lambda x: x.repeat(1, 2, 1, 1), last=partial(out, 48))
on_channels("tile", function=lambda x: torch.tile(x, (1, 2, 1, 1)), last=partial(out, 48))
on_channels(
    "repeat_interleave", function=lambda x: x.repeat_interleave(2, dim=1), last=partial(out, 48)
)
on_channels(
    "repeat_interleave_sized",
    function=lambda x: x.repeat_interleave(2, dim=1, output_size=48),
    last=partial(out, 48),
)
on_channels(
    "expand_channels",
    function=lambda x: x[:, None].expand(-1, 3, -1, -1, -1).reshape(x.size(0), 72, 9, 8),
    last=partial(out, 72),
)
on_channels("pad_channels", function=lambda x: F.pad(x, (0, 0, 0, 0, 3, 5)), last=partial(out, 32))
on_channels("pad_space", function=lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), last=out)
on_channels(
    "lowest_numbers",
    function=lambda x: (
        x.maximum(torch.full((), torch.finfo(x.dtype).min))
        .minimum(torch.tensor(data=torch.finfo(x.dtype).max, device=x.device))
        .maximum(torch.tensor(torch.finfo(x.dtype).min))
        .relu()
    ),
    last=out,
)
on_channels("roll_channels", function=lambda x: x.roll(5, 1), last=out)
on_channels("roll_space", function=lambda x: x.roll((2, 1), (2, 3)), last=out)
on_channels("flip_channels", function=lambda x: x.flip(1), last=out)
on_channels("flip_space", function=lambda x: x.flip(3), last=out)
on_channels("stack_sum", function=lambda x: torch.stack([x, x * x, x.tanh()]).sum(0), last=out)
on_channels(
    "stack_channels",
    function=lambda x: torch.stack([x, -x], 2).flatten(1, 2),
    last=partial(out, 48),
)


@structure(image)
class SplitUneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3, 24)
        self.a, self.b, self.c = conv(12, 10), conv(5, 10), conv(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.first(x).split([12, 5, 7], dim=1)
        return self.a(a) + self.b(b).relu() * self.c(c)


@structure(image)
class SliceAssignment(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 24), conv(24, 10), out()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.clone()
        y[:, 4:14] = self.middle(x)
        y[:, 14:].mul_(2)
        return self.last(y)


@structure(image)
class C2f(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 24, 1), conv(48, 10, 1)
        self.middle = nn.ModuleList(conv(12, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.first(x)).chunk(2, 1))
        y.extend(F.silu(m(y[-1])) for m in self.middle)
        return self.last(torch.cat(y, 1))


@structure(image)
class ZeroPadShortcut(nn.Module):
    """The option-A shortcut of ResNet on CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv1, self.conv2 = conv(3, 12), conv(12, 20, stride=2), conv(20, 20)
        self.last = out(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.last((self.conv2(self.conv1(x).relu()) + shortcut).relu())


@structure(image)
class ConcatInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 12), conv(15, 20), conv(23, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(torch.cat([x, self.first(x).relu()], 1)).relu()
        return self.last(torch.cat([y, x], 1))


@structure(image)
class CoordConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 20), conv(22, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.last(torch.cat([x, rows, columns], 1))


@structure(image)
class DenseConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3, 12)
        self.layers = nn.ModuleList(conv(12 + 5 * i, 5) for i in range(3))
        self.last = nn.Sequential(nn.BatchNorm2d(27), nn.ReLU(), out(27))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1).relu()))
        return self.last(torch.cat(features, 1))


@structure(image)
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = wide()
        self.a, self.c = conv(24, 10, 1), conv(24, 6, 1)
        self.b = nn.Sequential(conv(24, 8, 1), nn.ReLU(), conv(8, 14, 5))
        self.last = out(30)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pooled = F.avg_pool2d(x, 3, 1, 1)
        return self.last(torch.cat([self.a(x), self.b(x), self.c(pooled)], 1).relu())


# ------------------------------------------------------------------------------ views and flattens

on_channels("view_literal", function=lambda x: x.mean((2, 3)).view(-1, 24, 1, 1) * x, last=out)
on_channels("flatten_all", function=lambda x: x.flatten(1), last=partial(nn.Linear, 1728, 5))
on_channels(
    "flatten_rows", function=lambda x: x.permute(0, 3, 1, 2).flatten(2), last=partial(head, 216)
)
on_channels("flatten_literal", function=lambda x: x.view(-1, 1728), last=partial(head, 1728))
on_channels(
    "tokens_from_image", function=lambda x: x.flatten(2).transpose(1, 2), last=partial(head, 24)
)
on_channels("channels_last", function=lambda x: x.permute(0, 2, 3, 1), last=partial(head, 24))
on_channels(
    "batch_folded",
    function=lambda x: x.unflatten(1, (2, 12)).flatten(0, 1),
    last=partial(out, 12),
)
between(
    "unflatten_module",
    vector,
    lambda: nn.Sequential(nn.Linear(14, 120), nn.ReLU()),
    nn.Unflatten(1, (20, 3, 2)),
    partial(out, 20),
)
between(
    "video_as_batch",
    normal(5, 3, 6, 7),
    lambda: nn.Sequential(nn.Flatten(0, 1), wide()),
    lambda x: x.view(-1, 5, 24, 6, 7).mean(1),
    out,
)
on_channels("unfold", function=lambda x: F.unfold(x, 3), last=lambda: nn.Conv1d(216, 5, 1))
on_channels(
    "fold",
    function=lambda x: F.fold(x.flatten(2)[..., :25], (6, 7), (2, 3)),
    last=partial(out, 4),
)


@structure(normal(6, 6))
class FoldAcrossPieces(nn.Module):
    """Windows of nine out of pieces of five and thirteen: no slot of either can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 12, 1)
        self.five, self.thirteen = nn.Conv1d(12, 5, 1), nn.Conv1d(12, 13, 1)
        self.last = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        pieces = torch.cat([self.five(x), self.thirteen(x)], dim=1)
        return self.last(F.fold(pieces, (4, 5), (3, 3)))


on_features("maxout", function=lambda x: x.view(-1, 4, 5).amax(1), last=partial(head, 5))
on_channels(
    "maxout_channels", function=lambda x: x.unflatten(1, (8, 3)).amax(2), last=partial(out, 8)
)

# ---------------------------------------------------------------------------- constants and buffers

on_channels(
    "mask_multiply",
    function=lambda x: x * (x.mean(1, keepdim=True) > 0.3).to(x.dtype),
    last=out,
)
on_channels("masked_fill", function=lambda x: x.masked_fill(x > 1, -0.5), last=out)
on_channels("where", function=lambda x: torch.where(x > 0.5, x, x * 0.1), last=out)
on_channels(
    "index_select_constant",
    function=lambda x: x.index_select(1, torch.tensor([3, 1, 20, 7, 7])),
    last=partial(out, 5),
)
on_channels("index_list", function=lambda x: x[:, [0, 2, 4, 19, 23]], last=partial(out, 5))
on_channels(
    "permute_by_index",
    function=lambda x: x[:, torch.arange(23, -1, -1)],
    last=out,
)


@structure(image)
class ChannelBuffers(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 20), out(20)
        self.register_buffer("scale", torch.rand(1, 20, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(20, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.scale + self.shift).relu())


@structure(image)
class FrozenBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 20), out(20)
        for name, offset in (("weight", 0.5), ("bias", -0.5), ("mean", -0.3), ("variance", 0.7)):
            self.register_buffer(name, torch.rand(20) + offset)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.variance + 1e-5).rsqrt()
        shift = self.bias - self.mean * scale
        x = self.first(x) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return self.last(x.relu())


@structure(image)
class PlainTensorAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 20), out(20)
        self.scale = torch.rand(20, 1, 1) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * self.scale)


@structure(image)
class InputNormalisation(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = wide(), out()
        self.register_buffer("mean", torch.tensor([0.48, 0.45, 0.41]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first((x - self.mean) / 0.23))


@structure(vector)
class SquareParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), head()
        self.mix = nn.Parameter(torch.empty(20, 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) @ self.mix).relu())


@structure(image)
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 20), conv(20, 20), out(20)
        self.gamma = nn.Parameter(torch.empty(20, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.gamma * self.middle(x).relu())


@structure(vector)
class BuffersOnly(nn.Module):
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(14, 20) * 0.3)
        self.register_buffer("back", torch.randn(20, 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu() @ self.back


@structure(both(vector, lambda: (torch.tensor([[1, 4, 4, 0], [9, 2, 0, 13]]),)))
class GatherByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), nn.Linear(4, 5)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(self.first(x).gather(1, index))


@structure(both(normal(7, 14), lambda: (torch.tensor([[1, 4, 4, 0], [6, 2, 0, 5]]),)))
class GatherTimeByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), head()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x.gather(1, index[:, :, None].expand(-1, -1, x.size(-1))))


@structure(both(vector, lambda: (torch.tensor([3, 1]),)))
class IndexRowsByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), head()
        self.memory = nn.Parameter(torch.empty(6, 20))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(self.first(x) + self.memory[index])


@structure(
    both(normal(7, 14), lambda: (torch.tensor([[0, 1, 1, 3, 2, 2, 0], [2, 3, 0, 0, 1, 1, 1]]),))
)
class ScatterMessages(nn.Module):
    """One round of a graph network: nodes sum what their neighbours send."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.last = hidden(), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        sent = self.message(self.first(x)).relu()
        received = sent.new_zeros(x.size(0), 4, sent.size(-1))
        index = target[:, :, None].expand(-1, -1, sent.size(-1))
        return self.last(received.scatter_add(1, index, sent))


@structure(both(vector, lambda: (torch.tensor([[1], [9]]),)))
class ScatterFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), head()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(self.first(x).scatter(1, index, 1.5))


# ------------------------------------------------------------------------- along the channels

on_channels("global_mean", function=lambda x: x.mean((2, 3)), last=partial(head, 24))
on_channels("mean_over_channels", function=lambda x: x - x.mean(1, keepdim=True), last=out)
on_channels("normalise_channels", function=lambda x: F.normalize(x, dim=1), last=out)
on_channels("softmax_channels", function=lambda x: x.softmax(1), last=out)
on_channels("softmax_space", function=lambda x: x.flatten(2).softmax(2).view_as(x) * x, last=out)
on_channels("cumsum_channels", function=lambda x: x.cumsum(1) * 0.2, last=out)
on_channels("cumsum_space", function=lambda x: x.cumsum(3), last=out)
on_channels("sort_channels", function=lambda x: x.sort(1).values, last=out)
on_channels("topk_channels", function=lambda x: x.topk(10, 1).values, last=partial(out, 10))
on_channels("sum_over_channels", function=lambda x: x * x.sum(1, keepdim=True) * 0.1, last=out)
on_channels("max_over_channels", function=lambda x: x - x.max(1, keepdim=True).values, last=out)
on_channels("logsumexp_channels", function=lambda x: x - x.logsumexp(1, keepdim=True), last=out)
on_channels("var_space", function=lambda x: x.var((2, 3)) + x.std((2, 3)), last=partial(head, 24))
on_channels("fft_space", function=lambda x: torch.fft.rfft2(x).abs() * 0.2, last=out)
on_channels(
    "fft_channels", function=lambda x: torch.fft.rfft(x, dim=1).abs(), last=partial(out, 13)
)
on_channels(
    "smooth_channels",
    function=lambda x: F.avg_pool1d(x.flatten(2).mT, 3, 1, 1).mT.view_as(x),
    last=out,
)
on_channels(
    "gram_matrix",
    function=lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT).flatten(1) / 72,
    last=partial(head, 576),
)
on_channels(
    "einsum_gram",
    function=lambda x: torch.einsum("bchw,bdhw->bcd", x, x).flatten(1) / 72,
    last=partial(head, 576),
)
on_channels(
    "einsum_sum", function=lambda x: torch.einsum("bchw->bc", x) / 72, last=partial(head, 24)
)
on_channels(
    "outer_product",
    function=lambda x: torch.einsum("bi,bj->bij", x.mean((2, 3)), x.amax((2, 3))[:, :5]).flatten(1),
    last=partial(head, 120),
)
on_features(
    "cosine_similarity",
    function=lambda x: x * F.cosine_similarity(x, x.tanh(), dim=1)[:, None],
    last=head,
)
on_features("in_place", function=lambda x: x.add_(1).mul_(0.5).clamp_(max=1.2), last=head)


@structure(image)
class EinsumProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = wide(), out(10)
        self.weight, self.scale = nn.Parameter(torch.empty(24, 10)), nn.Parameter(torch.empty(10))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bchw,cd->bdhw", self.first(x), self.weight * 0.3)
        return self.last(torch.einsum("b d h w, d -> b d h w", x, self.scale).relu())


@structure(normal(10, 14))
class EinsumPerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), head(12)
        self.inner = nn.Parameter(torch.empty(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(-1, (4, 5))
        return self.last(torch.einsum("...hi,hio->...ho", x, self.inner).flatten(-2))


@structure(normal(10, 14))
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(14, 20), head()
        self.time = nn.Sequential(nn.Linear(10, 18), nn.GELU(), nn.Linear(18, 10))
        self.channel = nn.Sequential(nn.Linear(20, 36), nn.GELU(), nn.Linear(36, 20))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.time(x.transpose(1, 2)).transpose(1, 2)
        return self.last(x + self.channel(x))


@structure(image)
class ChannelsLastNorm(nn.Module):
    """A ConvNeXt block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = conv(3, 20), conv(20, 20, 5, groups=20)
        self.norm, self.up, self.down = nn.LayerNorm(20), nn.Linear(20, 36), nn.Linear(36, 20)
        self.gamma, self.last = nn.Parameter(torch.empty(20)), out(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return self.last(x + y)
