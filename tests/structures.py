"""Small structures that are hard to prune: what breaks or silently falsifies other tools.

`STRUCTURES[name].build()` is one idea in a few lines, its widths chosen so that no two agree by
accident. Channels, views, constants and outputs are here; attention and recurrence are in
`structures_attention`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.structures_attention import STRUCTURES
from tests.structures_registry import Structure, between, both, conv, normal, register, structure

__all__ = ["STRUCTURES", "Structure"]

image = normal(3, 9, 8)
vector = normal(14)
series = normal(6, 11)


def wide() -> nn.Module:
    return nn.Sequential(conv(3, 24), nn.BatchNorm2d(24), nn.ReLU())


def out(channels: int = 24) -> nn.Module:
    return conv(channels, 7, 1)


def hidden() -> nn.Module:
    return nn.Sequential(nn.Linear(14, 20), nn.ReLU())


def head(features: int = 20) -> nn.Module:
    return nn.Linear(features, 5)


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
on_channels("split_in_two", function=lambda x: torch.mul(*torch.split(x, 12, 1)), last=partial(out, 12))
on_channels("split_loop", function=lambda x: sum(x.split(6, dim=1)), last=partial(out, 6))
on_channels("chunk", function=lambda x: torch.maximum(*x.chunk(2, 1)), last=partial(out, 12))
on_channels("chunk_uneven", function=lambda x: torch.cat(x.chunk(5, 1)[:4], 1), last=partial(out, 20))
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
    "expand_channels",
    function=lambda x: x[:, None].expand(-1, 3, -1, -1, -1).reshape(x.size(0), 72, 9, 8),
    last=partial(out, 72),
)
on_channels("pad_channels", function=lambda x: F.pad(x, (0, 0, 0, 0, 3, 5)), last=partial(out, 32))
on_channels("pad_space", function=lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), last=out)
on_channels("roll_channels", function=lambda x: x.roll(5, 1), last=out)
on_channels("roll_space", function=lambda x: x.roll((2, 1), (2, 3)), last=out)
on_channels("flip_channels", function=lambda x: x.flip(1), last=out)
on_channels("flip_space", function=lambda x: x.flip(3), last=out)
on_channels("stack_sum", function=lambda x: torch.stack([x, x * x, x.tanh()]).sum(0), last=out)
on_channels("stack_channels", function=lambda x: torch.stack([x, -x], 2).flatten(1, 2), last=partial(out, 48))


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
on_channels("flatten_rows", function=lambda x: x.permute(0, 3, 1, 2).flatten(2), last=partial(head, 216))
on_channels("flatten_literal", function=lambda x: x.view(-1, 1728), last=partial(head, 1728))
on_channels("tokens_from_image", function=lambda x: x.flatten(2).transpose(1, 2), last=partial(head, 24))
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
    function=lambda x: F.fold(x.flatten(2)[..., :20], (6, 7), (2, 3)),
    last=partial(out, 4),
)
on_features("maxout", function=lambda x: x.view(-1, 4, 5).amax(1), last=partial(head, 5))
on_channels("maxout_channels", function=lambda x: x.unflatten(1, (8, 3)).amax(2), last=partial(out, 8))

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


@structure(both(normal(7, 14), lambda: (torch.tensor([[0, 1, 1, 3, 2, 2, 0], [2, 3, 0, 0, 1, 1, 1]]),)))
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


# ------------------------------------------------------------ convolutions and their relations


def chain(name: str, *layers: partial[nn.Module], inputs=image) -> None:  # noqa: ANN001
    register(name, lambda: nn.Sequential(*(layer() for layer in layers)), inputs)


relu = partial(nn.ReLU)
chain("plain", wide, partial(conv, 24, 20), relu, partial(out, 20))
chain("depthwise", wide, partial(conv, 24, 24, groups=24), relu, out)
chain("depthwise_multiplier", wide, partial(conv, 24, 48, groups=24), relu, partial(out, 48))
chain("grouped", wide, partial(conv, 24, 36, groups=4), relu, partial(out, 36))
chain(
    "grouped_chain",
    wide,
    partial(conv, 24, 36, groups=4),
    relu,
    partial(conv, 36, 30, groups=3),
    relu,
    partial(conv, 30, 20, groups=10),
    relu,
    partial(out, 20),
)
chain("grouped_first", partial(nn.Conv2d, 3, 18, 3, groups=3), relu, partial(out, 18))
chain("transposed", wide, partial(nn.ConvTranspose2d, 24, 10, 3, 2), relu, partial(out, 10))
chain(
    "transposed_grouped",
    wide,
    partial(nn.ConvTranspose2d, 24, 20, 4, 2, groups=4),
    relu,
    partial(out, 20),
)
chain("transposed_depthwise", wide, partial(nn.ConvTranspose2d, 24, 24, 2, 2, groups=24), out)
chain(
    "conv1d",
    partial(nn.Conv1d, 6, 20, 3, padding=1),
    partial(nn.BatchNorm1d, 20),
    relu,
    partial(nn.MaxPool1d, 2),
    partial(nn.Conv1d, 20, 12, 3, dilation=2),
    inputs=series,
)
chain(
    "conv3d",
    partial(nn.Conv3d, 2, 12, 3, padding=1),
    partial(nn.BatchNorm3d, 12),
    relu,
    partial(nn.AvgPool3d, (1, 2, 2)),
    partial(nn.Conv3d, 12, 5, (2, 1, 1)),
    inputs=normal(2, 4, 6, 6),
)
chain("strided", partial(conv, 3, 20, stride=2), partial(nn.PReLU, 20), partial(out, 20))
chain("mlp", hidden, partial(nn.BatchNorm1d, 20), partial(nn.Linear, 20, 24), nn.Tanh, partial(head, 24), inputs=vector)
chain("group_norm", wide, partial(conv, 24, 20), partial(nn.GroupNorm, 5, 20), partial(out, 20))
chain("instance_norm", wide, partial(nn.InstanceNorm2d, 24, affine=True), out)
chain(
    "instance_norm_tracking",
    wide,
    partial(nn.InstanceNorm2d, 24, affine=True, track_running_stats=True),
    out,
)
chain("layer_norm_image", wide, partial(nn.LayerNorm, [24, 9, 8]), out)
chain("layer_norm_space", wide, partial(nn.LayerNorm, [9, 8]), out)
chain("layer_norm", hidden, partial(nn.LayerNorm, 20), head, inputs=vector)
chain("rms_norm", hidden, partial(nn.RMSNorm, 20), head, inputs=vector)
chain("local_response_norm", wide, partial(nn.LocalResponseNorm, 5), out)
chain("dropout", wide, partial(nn.Dropout2d, 0.3), partial(nn.AlphaDropout, 0.1), out)
chain("adaptive_pool", wide, partial(nn.AdaptiveMaxPool2d, (2, 3)), nn.Flatten, partial(head, 144))
chain("upsample", wide, partial(nn.Upsample, scale_factor=2, mode="bilinear"), out)
chain("identity", wide, nn.Identity, partial(nn.Softplus, 2), out)
chain("weight_norm", lambda: parametrizations.weight_norm(conv(3, 20)), relu, lambda: parametrizations.weight_norm(out(20)))
chain("spectral_norm", lambda: parametrizations.spectral_norm(conv(3, 20)), relu, lambda: parametrizations.spectral_norm(out(20)))
chain("frozen_layers", lambda: wide().requires_grad_(False), partial(conv, 24, 20), relu, partial(out, 20))
chain("all_frozen", lambda: wide().requires_grad_(False), lambda: out().requires_grad_(False))


@structure(vector)
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(14, 12), nn.Linear(14, 10), nn.Bilinear(12, 10, 20)
        self.last = head()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.a(x).relu(), self.b(x).tanh()).relu())


@structure(image)
class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 20), conv(20, 20), out(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.middle(self.first(x)).relu()).relu())


@structure(image)
class Siamese(nn.Module):
    """The same layers on two inputs, the features joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = wide(), out(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x), self.first(x.flip(3))], 1))


@structure(vector)
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(14, 20)
        self.bias = nn.Parameter(torch.empty(14))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).relu(), self.encode.weight.t(), self.bias)


@structure(image)
class TiedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = conv(3, 20), conv(20, 12), conv(20, 12), out(12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.a(x) * self.b(x).sigmoid())


@structure(image)
class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(20, 3, 3, 3)), nn.Parameter(torch.empty(20))
        self.last = out(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.conv2d(x, self.weight * 0.3, self.bias, padding=1).relu())


@structure(image)
class ScaledWeight(nn.Module):
    """Standardised weights: the parameter is computed with before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 20), conv(20, 12), out(12)

    def forward(self, x: Tensor) -> Tensor:
        w = self.middle.weight
        w = (w - w.mean((2, 3), keepdim=True)) * 1.5
        return self.last(F.conv2d(self.first(x).relu(), w, self.middle.bias, padding=1).relu())


@structure(image)
class DynamicDepthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel, self.last = conv(3, 20), nn.Linear(20, 20), out(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        b, c, h, w = x.shape
        kernel = self.kernel(x.mean((2, 3))).reshape(b * c, 1, 1, 1)
        x = F.conv2d(x.reshape(1, b * c, h, w), kernel, groups=b * c).view(b, c, h, w)
        return self.last(x)


# --------------------------------------------------------------------------- joins of two branches


@structure(image)
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = wide()
        self.middle = nn.Sequential(conv(24, 10), nn.BatchNorm2d(10), nn.ReLU(), conv(10, 24))
        self.last = out()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((x + self.middle(x)).relu())


@structure(image)
class ResidualProjected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.short = wide(), conv(24, 20, 1, stride=2)
        self.middle = nn.Sequential(conv(24, 10, stride=2), nn.ReLU(), conv(10, 20))
        self.last = out(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((self.short(x) + self.middle(x)).relu())


@structure(image)
class ResidualWithInput(nn.Module):
    """The stream is the input itself: only the inside of the branch can go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = conv(3, 20), conv(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


@structure(image)
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = wide(), out()
        self.squeeze, self.excite = nn.Linear(24, 10), nn.Linear(10, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, _, _ = x.size()
        y = self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1).view(b, c)).relu()).sigmoid()
        return self.last(x * y.view(b, c, 1, 1).expand_as(x))


@structure(image)
class SpatialAttention(nn.Module):
    """CBAM's second half: mean and maximum over the channels make a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mask, self.last = wide(), conv(2, 1, 5), out()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mask = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.last(x * self.mask(mask).sigmoid())


@structure(vector)
class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(14, 20), nn.Linear(14, 20), head()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@structure(vector)
class SwiGLUFused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(14, 40), head()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@structure(image)
class DetachBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = wide(), conv(24, 10), out(34)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.side(x.detach()).relu()], 1))


@structure(series)
class WaveNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(6, 12, 1), nn.Conv1d(10, 5, 1)
        self.gate, self.filter = nn.Conv1d(12, 20, 2), nn.Conv1d(12, 20, 2)
        self.residual, self.skip = nn.Conv1d(20, 12, 1), nn.Conv1d(20, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for _ in range(2):
            y = F.pad(x, (1, 0))
            y = self.filter(y).tanh() * self.gate(y).sigmoid()
            skips.append(self.skip(y))
            x = x + self.residual(y)
        return self.last(sum(skips).relu())


@structure(series)
class CausalChomp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 20, 3, padding=4, dilation=2)
        self.last = nn.Conv1d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, :, :-4].relu().contiguous())


@structure(both(image, normal(9, 8, 2, seed=2)))
class GridSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = wide(), out()

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return self.last(F.grid_sample(self.first(x), grid.tanh(), align_corners=False))


@structure(image)
class InterpolateToSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.last = conv(3, 12), conv(12, 20, stride=2), out(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = F.interpolate(self.down(x).relu(), size=x.shape[2:], mode="nearest")
        return self.last(torch.cat([x, y], 1))


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
on_channels(
    "var_space", function=lambda x: x.var((2, 3)) + x.std((2, 3)), last=partial(head, 24)
)
on_channels("fft_space", function=lambda x: torch.fft.rfft2(x).abs() * 0.2, last=out)
on_channels("fft_channels", function=lambda x: torch.fft.rfft(x, dim=1).abs(), last=partial(out, 13))
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
on_channels("einsum_sum", function=lambda x: torch.einsum("bchw->bc", x) / 72, last=partial(head, 24))
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


# -------------------------------------------------------------- outputs, inputs, control flow


@dataclasses.dataclass
class Detections:
    boxes: Tensor
    scores: Tensor


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.boxes, self.scores = wide(), conv(24, 4), conv(24, 7)


@structure(image)
class TupleOutput(TwoHeads):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return self.boxes(x), self.scores(x)


@structure(image)
class DictOutput(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        return {"boxes": self.boxes(x), "scores": self.scores(x).mean((2, 3))}


@structure(image)
class DataclassOutput(TwoHeads):
    def forward(self, x: Tensor) -> Detections:
        x = self.first(x)
        return Detections(self.boxes(x), self.scores(x))


@structure(image)
class FeaturesOutput(TwoHeads):
    """The features are an output too, so their width is a promise."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.first(x)
        return x, [self.boxes(x), self.scores(x)]


@structure(vector)
class ControlFlow(nn.Module):
    """Which branch runs depends on the data; both must fit afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = hidden(), nn.Linear(20, 12), nn.Linear(20, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.a(x) if x.sum() > 0 else self.b(x)
        return self.last(x.relu())


@structure(vector)
class UnusedParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = hidden(), head(), nn.Linear(20, 9)
        self.spare = nn.Parameter(torch.empty(20))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@structure(image)
class AuxiliaryHead(nn.Module):
    """A second output, only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = wide(), conv(24, 20), out(20)
        self.auxiliary = out()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        y = self.last(self.middle(x).relu())
        return (y, self.auxiliary(x)) if self.training else y


@structure(lambda: {"x": vector()[0], "scale": normal(1, seed=3)()[0]})
class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = hidden(), head()

    def forward(self, *, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.first(x)
        return self.last(x if scale is None else x * scale)


@structure(both(image, normal(5, seed=4)))
class Conditioned(nn.Module):
    """FiLM: a vector scales and shifts the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.film, self.last = wide(), nn.Linear(5, 48), out()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        return self.last((self.first(x) * (1 + scale) + shift).relu())


@structure(vector)
class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = hidden(), nn.Linear(20, 4), head(12)
        self.experts = nn.ModuleList(nn.Linear(20, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gates = self.gate(x).softmax(-1)
        mixed = torch.stack([expert(x).relu() for expert in self.experts], 1)
        return self.last((gates[:, :, None] * mixed).sum(1))
