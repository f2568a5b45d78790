"""Small structures of layers: convolutions, norms, branches, outputs, control flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.structures_registry import (
    Arguments,
    both,
    conv,
    head,
    hidden,
    image,
    normal,
    out,
    register,
    series,
    structure,
    vector,
    wide,
)

# ------------------------------------------------------------ convolutions and their relations


def chain(
    name: str, *layers: Callable[[], nn.Module], inputs: Callable[[], Arguments] = image
) -> None:
    register(name, lambda: nn.Sequential(*(layer() for layer in layers)), inputs)


relu = nn.ReLU
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
chain(
    "mlp",
    hidden,
    partial(nn.BatchNorm1d, 20),
    partial(nn.Linear, 20, 24),
    nn.Tanh,
    partial(head, 24),
    inputs=vector,
)
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
chain(
    "weight_norm",
    lambda: parametrizations.weight_norm(conv(3, 20)),
    relu,
    lambda: parametrizations.weight_norm(out(20)),
)
chain(
    "spectral_norm",
    lambda: parametrizations.spectral_norm(conv(3, 20)),
    relu,
    lambda: parametrizations.spectral_norm(out(20)),
)
chain(
    "frozen_layers",
    lambda: wide().requires_grad_(False),
    partial(conv, 24, 20),
    relu,
    partial(out, 20),
)
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
        self.weight, self.bias = (
            nn.Parameter(torch.empty(20, 3, 3, 3)),
            nn.Parameter(torch.empty(20)),
        )
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
        self.first, self.a, self.b, self.last = (
            hidden(),
            nn.Linear(20, 12),
            nn.Linear(20, 12),
            head(12),
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.a if x.sum() > 0 else self.b
        return self.last(branch(self.first(x)).relu())


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
class ConditionalOperator(nn.Module):
    """`torch.cond`, an operator on functions, which has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = hidden(), nn.Linear(20, 16), head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return self.last(self.middle(x).relu())


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


@structure(normal(7, 16))
class GroupedExperts(nn.Module):
    """Each token goes to one expert; the experts' matrices meet their tokens in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(16, 32), nn.Linear(16, 3), nn.Linear(32, 6)
        self.inward = nn.Parameter(torch.empty(3, 32, 48))
        self.outward = nn.Parameter(torch.empty(3, 48, 32))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.gate(x).argmax(-1).flatten()
        order = expert.argsort()
        ends = torch.histc(expert.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
        tokens = self.first(x).flatten(0, 1)[order]
        hidden = torch._grouped_mm(tokens, self.inward, offs=ends).relu()
        mixed = torch._grouped_mm(hidden, self.outward, offs=ends)[order.argsort()]
        return self.last(mixed.view(*x.shape[:2], -1))
