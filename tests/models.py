"""Real architectures for the tests and the benchmarks: at their published size, and small.

`ALL[name](small=True)` gives an `Example`: a model in eval mode and real inputs at batch 2. Every
parameter is random, and so are batch norm's statistics: a pruned bias of zero or a scale of one is
a bug that no output shows. `build(name, small=False)` gives the bare module, also on the meta
device.

The transformers are built from configurations; that library is imported when one is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graphprune.inputs import Inputs, call

# ------------------------------------------------------------------------------ random parameters


def randomise(model: nn.Module, inputs: Any = None, seed: int = 0) -> nn.Module:
    """Return the model in eval mode, every parameter drawn anew, with signals of about unit size.

    Weights are normal with 1 / fan-in as variance, biases are not zero, norms neither scale by one
    nor shift by zero. With inputs, batch norm's statistics are those of these inputs, disturbed:
    random ones would make the signal of a deep network die out or blow up.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, std: float, mean: float = 0.0) -> None:
        p.copy_(torch.randn(p.shape, generator=generator) * std + mean)

    def uniform(p: Tensor, low: float, high: float) -> None:
        p.copy_(torch.rand(p.shape, generator=generator) * (high - low) + low)

    def disturb_statistics(module: nn.Module, args: tuple[Tensor]) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        variance, mean = torch.var_mean(args[0], dim=dims, correction=0)
        uniform(module.running_var, 0.6, 1.6)
        normal(module.running_mean, 0.3)
        module.running_mean.mul_(variance.sqrt()).add_(mean)
        module.running_var.mul_(variance + 1e-3)

    drawn: set[Tensor] = set()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.utils.parametrize.ParametrizationList):
                continue  # already random, and its parts belong together
            kind = type(module).__name__
            for name, p in module.named_parameters(recurse=False):
                if p in drawn or not p.is_floating_point():
                    continue
                drawn.add(p)
                if "Norm" in kind and "weight" in name:
                    uniform(p, 0.6, 1.4)
                elif "bias" in name or "Norm" in kind:
                    normal(p, 0.2)
                elif isinstance(module, nn.PReLU):
                    uniform(p, 0.05, 0.5)
                elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                    normal(p, 0.3)
                elif kind == "Conv1D":  # of transformers: weight [in, out]
                    normal(p, p.shape[0] ** -0.5)
                elif isinstance(module, _ConvTransposeNd):
                    reached = p[0, 0].numel() / math.prod(module.stride)
                    normal(p, (reached * p.shape[0] / module.groups) ** -0.5)
                elif isinstance(
                    module, (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
                ):
                    normal(p, 1.2 * p[0].numel() ** -0.5)
                elif isinstance(module, nn.MultiheadAttention):
                    normal(p, p.shape[-1] ** -0.5)
                elif p.dim() == 2 and p.shape[0] == p.shape[1]:
                    normal(p, p.shape[0] ** -0.5)
                else:
                    normal(p, 0.4, mean=0.3)
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        for norm in norms:
            normal(norm.running_mean, 0.3)
            uniform(norm.running_var, 0.6, 1.6)
        if inputs is not None and norms:
            hooks = [norm.register_forward_pre_hook(disturb_statistics) for norm in norms]
            call(model, Inputs.of(inputs))
            for hook in hooks:
                hook.remove()
    return model


def uniform_images(batch: int, *shape: int, seed: int = 1) -> Tensor:
    """Return normal noise with an offset, so that no channel's mean is zero."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)) + 0.25


def random_tokens(batch: int, length: int, vocabulary: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def divisible_by_8(channels: float) -> int:
    """Return the nearest multiple of 8, but at least 8 and no more than 10 % less."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """Return convolution without bias, batch norm and, if any, the activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


# ------------------------------------------------------------------------------ image classifiers


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += identity
        return self.relu(x)


class ResNet(nn.Module):
    """He et al. 2016; with groups, ResNeXt (Xie et al. 2017)."""

    def __init__(
        self, width: int, classes: int, layers: Sequence[int], groups: int, group_width: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for i, repeats in enumerate(layers):
            planes = width << i
            middle, blocks = planes * group_width // 64 * groups, []
            for j in range(repeats):
                stride = 2 if i and j == 0 else 1
                blocks.append(Bottleneck(channels, middle, 4 * planes, stride, groups))
                channels = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet50(
    width: int = 64, classes: int = 1000, layers: Sequence[int] = (3, 4, 6, 3)
) -> nn.Module:
    return ResNet(width, classes, layers, groups=1, group_width=64)


def resnext50(
    width: int = 64,
    classes: int = 1000,
    layers: Sequence[int] = (3, 4, 6, 3),
    groups: int = 32,
    group_width: int = 4,
) -> nn.Module:
    return ResNet(width, classes, layers, groups, group_width)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project: MobileNetV2's block; with squeeze-excite EfficientNet's."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        expand: int,
        activation: Callable[[], nn.Module],
        squeeze: bool,
    ) -> None:
        super().__init__()
        middle = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(conv_norm(inputs, middle, activation=activation))
        layers.append(conv_norm(middle, middle, kernel, stride, middle, activation))
        if squeeze:
            layers.append(SqueezeExcite(middle, max(1, inputs // 4)))
        layers.append(conv_norm(middle, outputs))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class SqueezeExcite(nn.Module):
    """Hu et al. 2018."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.silu(self.fc1(self.avgpool(x))))) * x


class InvertedResidualNet(nn.Module):
    def __init__(
        self,
        stem: int,
        stages: Sequence[tuple[int, int, int, int, int]],
        head: int,
        classes: int,
        activation: Callable[[], nn.Module],
        squeeze: bool,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(3, stem, 3, 2, activation=activation)]
        channels = stem
        for expand, kernel, stride, outputs, repeats in stages:
            for i in range(repeats):
                block = InvertedResidual(
                    channels, outputs, kernel, 1 if i else stride, expand, activation, squeeze
                )
                layers.append(block)
                channels = outputs
        layers.append(conv_norm(channels, head, activation=activation))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v2(
    width: float = 1.0, classes: int = 1000, head: int = 1280, repeats: bool = True
) -> nn.Module:
    """Sandler et al. 2018. Without repeats, each stage has at most two blocks."""
    table = [
        (1, 1, 16, 1),
        (6, 2, 24, 2),
        (6, 2, 32, 3),
        (6, 2, 64, 4),
        (6, 1, 96, 3),
        (6, 2, 160, 3),
        (6, 1, 320, 1),
    ]
    stages = [
        (expand, 3, stride, divisible_by_8(outputs * width), n if repeats else min(n, 2))
        for expand, stride, outputs, n in table
    ]
    stem = divisible_by_8(32 * width)
    activation = functools.partial(nn.ReLU6, inplace=True)
    return InvertedResidualNet(stem, stages, head, classes, activation, squeeze=False)


def efficientnet_b0(
    width: float = 1.0, classes: int = 1000, head: int = 1280, repeats: bool = True
) -> nn.Module:
    """Tan and Le 2019. Without repeats, each stage has at most two blocks."""
    table = [
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ]
    stages = [
        (expand, kernel, stride, divisible_by_8(outputs * width), n if repeats else min(n, 2))
        for expand, kernel, stride, outputs, n in table
    ]
    stem = divisible_by_8(32 * width)
    return InvertedResidualNet(stem, stages, head, classes, nn.SiLU, squeeze=True)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
        )
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNet(nn.Module):
    """Huang et al. 2017."""

    def __init__(self, growth: int, layers: Sequence[int], stem: int, classes: int) -> None:
        super().__init__()
        self.stem = conv_norm(3, stem, 7, 2, activation=nn.ReLU)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels = stem
        for i, repeats in enumerate(layers):
            block = [DenseLayer(channels + j * growth, growth) for j in range(repeats)]
            self.blocks.append(nn.ModuleList(block))
            channels += repeats * growth
            self.transitions.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
            if i < len(layers) - 1:
                self.transitions[-1].append(nn.Conv2d(channels, channels // 2, 1, bias=False))
                self.transitions[-1].append(nn.AvgPool2d(2, 2))
                channels //= 2
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = transition(torch.cat(features, 1))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def densenet121(
    growth: int = 32,
    layers: Sequence[int] = (6, 12, 24, 16),
    stem: int = 64,
    classes: int = 1000,
) -> nn.Module:
    return DenseNet(growth, layers, stem, classes)


class ShuffleUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        branch = outputs // 2
        self.stride = stride
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv_norm(inputs, inputs, 3, stride, inputs),
                conv_norm(inputs, branch, activation=nn.ReLU),
            )
        self.branch2 = nn.Sequential(
            conv_norm(inputs if stride > 1 else branch, branch, activation=nn.ReLU),
            conv_norm(branch, branch, 3, stride, branch),
            conv_norm(branch, branch, activation=nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            x = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            x = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width)
        x = torch.transpose(x, 1, 2).contiguous()
        return x.view(batch, channels, height, width)


class ShuffleNet(nn.Module):
    """Ma et al. 2018."""

    def __init__(self, repeats: Sequence[int], channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stem = conv_norm(3, channels[0], 3, 2, activation=nn.ReLU)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for n, inputs, outputs in zip(repeats, channels[:-2], channels[1:-1], strict=True):
            stages.append(ShuffleUnit(inputs, outputs, 2))
            stages += [ShuffleUnit(outputs, outputs, 1) for _ in range(n - 1)]
        self.stages = nn.Sequential(*stages)
        self.conv5 = conv_norm(channels[-2], channels[-1], activation=nn.ReLU)
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stages(self.maxpool(self.stem(x))))
        return self.fc(x.mean([2, 3]))


def shufflenet_v2(
    repeats: Sequence[int] = (4, 8, 4),
    channels: Sequence[int] = (24, 116, 232, 464, 1024),
    classes: int = 1000,
) -> nn.Module:
    return ShuffleNet(repeats, channels, classes)


# ------------------------------------------------------------- segmentation, detection, resolution


class UNet(nn.Module):
    """Ronneberger et al. 2015, with padding and batch norm, as everybody uses it."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width << i for i in range(depth + 1)]

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            first = conv_norm(inputs, outputs, 3, activation=nn.ReLU)
            return nn.Sequential(first, conv_norm(outputs, outputs, 3, activation=nn.ReLU))

        self.down = nn.ModuleList(map(twice, [3, *widths[:-1]], widths))
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for small, large in reversed(list(itertools.pairwise(widths))):
            self.up.append(nn.ConvTranspose2d(large, small, 2, 2))
            self.merge.append(twice(large, small))
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.out(x)


def unet(width: int = 64, depth: int = 4, classes: int = 2) -> nn.Module:
    return UNet(width, depth, classes)


def conv_silu(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    return conv_norm(inputs, outputs, kernel, stride, activation=nn.SiLU)


class C2f(nn.Module):
    """The block of YOLOv8: chunk in two, grow a list of features, concatenate."""

    def __init__(self, inputs: int, outputs: int, repeats: int, shortcut: bool) -> None:
        super().__init__()
        c = outputs // 2
        self.cv1, self.cv2 = conv_silu(inputs, 2 * c), conv_silu((2 + repeats) * c, outputs)
        self.m = nn.ModuleList(
            nn.Sequential(conv_silu(c, c, 3), conv_silu(c, c, 3)) for _ in range(repeats)
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]) if self.shortcut else m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class PoolPyramid(nn.Module):
    """SPPF: the same pooling one, two and three times over."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv_silu(channels, channels // 2), conv_silu(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class YoloNeck(nn.Module):
    """YOLOv8 up to the raw maps of its three scales: backbone, neck, one head a scale."""

    def __init__(self, widths: Sequence[int], box: int, classes: int) -> None:
        super().__init__()
        w0, w1, w2, w3, w4 = widths
        self.stem = nn.Sequential(
            conv_silu(3, w0, 3, 2), conv_silu(w0, w1, 3, 2), C2f(w1, w1, 1, True)
        )
        self.p3 = nn.Sequential(conv_silu(w1, w2, 3, 2), C2f(w2, w2, 2, True))
        self.p4 = nn.Sequential(conv_silu(w2, w3, 3, 2), C2f(w3, w3, 2, True))
        self.p5 = nn.Sequential(conv_silu(w3, w4, 3, 2), C2f(w4, w4, 1, True), PoolPyramid(w4))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up4, self.up3 = C2f(w4 + w3, w3, 1, False), C2f(w3 + w2, w2, 1, False)
        self.down3, self.out4 = conv_silu(w2, w2, 3, 2), C2f(w2 + w3, w3, 1, False)
        self.down4, self.out5 = conv_silu(w3, w3, 3, 2), C2f(w3 + w4, w4, 1, False)
        scales, middle = (w2, w3, w4), max(w2, min(classes, 100))
        self.boxes = nn.ModuleList(self.head(w, box, box) for w in scales)
        self.classes = nn.ModuleList(self.head(w, middle, classes) for w in scales)

    @staticmethod
    def head(inputs: int, middle: int, outputs: int) -> nn.Sequential:
        last = nn.Conv2d(middle, outputs, 1)
        return nn.Sequential(conv_silu(inputs, middle, 3), conv_silu(middle, middle, 3), last)

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat([self.up(p5), p4], 1))
        n3 = self.up3(torch.cat([self.up(n4), p3], 1))
        n4 = self.out4(torch.cat([self.down3(n3), n4], 1))
        n5 = self.out5(torch.cat([self.down4(n4), p5], 1))
        heads = zip((n3, n4, n5), self.boxes, self.classes, strict=True)
        return [torch.cat([box(n), classes(n)], 1) for n, box, classes in heads]


def yolo_neck(
    widths: Sequence[int] = (16, 32, 64, 128, 256), box: int = 64, classes: int = 80
) -> nn.Module:
    return YoloNeck(widths, box, classes)


class Upsampler(nn.Module):
    """EDSR-baseline (Lim et al. 2017) without its constant shift of the mean."""

    def __init__(self, width: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(True),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, width * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = x
        for block in self.blocks:
            y = y + 0.5 * block(y)
        x = x + self.last(y)
        return self.tail(self.shuffle(self.expand(x)))


def pixel_shuffle_upsampler(width: int = 64, blocks: int = 16, scale: int = 2) -> nn.Module:
    return Upsampler(width, blocks, scale)


# ------------------------------------------------------------------------------------- recurrent


class CRNN(nn.Module):
    """Shi et al. 2017, reading a line of text: columns of the feature map are the time steps."""

    def __init__(self, widths: Sequence[int], height: int, hidden: int, classes: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.features = nn.Sequential(
            nn.Conv2d(1, a, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(a, b, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            *conv_norm(b, c, 3, activation=nn.ReLU),
            nn.Conv2d(c, c, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1), (2, 1)),
            *conv_norm(c, d, 3, activation=nn.ReLU),
            nn.Conv2d(d, d, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1), (2, 1)),
            nn.Conv2d(d, d, 2, bias=False),
            nn.BatchNorm2d(d),
            nn.ReLU(),
        )
        rows = height // 16 - 1
        self.lstm = nn.LSTM(d * rows, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).permute(0, 3, 1, 2)
        x = x.reshape(x.size(0), x.size(1), -1)
        x, _ = self.lstm(x)
        return self.fc(x)


def crnn(
    widths: Sequence[int] = (64, 128, 256, 512),
    height: int = 32,
    hidden: int = 256,
    classes: int = 37,
) -> nn.Module:
    return CRNN(widths, height, hidden, classes)


class Classifier(nn.Module):
    """A class for a sequence of tokens: embedding, 2-layer bidirectional LSTM, its last step."""

    def __init__(self, vocabulary: int, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.lstm = nn.LSTM(features, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (h, _) = self.lstm(self.embedding(tokens))
        return self.fc(torch.cat([h[-2], h[-1]], dim=1))


def lstm_net(
    vocabulary: int = 10000, features: int = 200, hidden: int = 256, classes: int = 20
) -> nn.Module:
    return Classifier(vocabulary, features, hidden, classes)


class Tagger(nn.Module):
    """A class for each step of a signal: projection, 2-layer bidirectional GRU, linear head."""

    def __init__(self, features: int, projected: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, projected)
        self.gru = nn.GRU(projected, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(torch.relu(self.projection(x)))
        return self.fc(x)


def gru_net(
    features: int = 80, projected: int = 128, hidden: int = 256, classes: int = 41
) -> nn.Module:
    return Tagger(features, projected, hidden, classes)


# ---------------------------------------------------------------------------------- transformers


def import_torchvision() -> ModuleType:
    """Return the library.

    Where it and torch are of different builds, the import fails until two operators that nothing here
    needs are declared.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        return importlib.import_module("torchvision")


def import_transformers() -> ModuleType:
    """Return the library, which imports torchvision where there is one."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    return importlib.import_module("transformers")


def bert(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 88,
        "max_position_embeddings": 40,
    }
    return transformers.BertModel(transformers.BertConfig(**({} if full else small)))


def gpt2(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "n_embd": 60,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 92,
        "n_positions": 40,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(use_cache=False, **({} if full else small))
    )


def llama(full: bool = False) -> nn.Module:
    """Grouped-query attention: 3 queries a key-value head. Full: 100M parameters, head tied."""
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 76,
        "max_position_embeddings": 40,
    }
    base: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(use_cache=False, **(base if full else small))
    )


def vit(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "hidden_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 88,
        "image_size": 30,
        "patch_size": 6,
        "num_labels": 10,
    }
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**({"num_labels": 1000} if full else small))
    )


def swin(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "image_size": 24,
        "patch_size": 2,
        "embed_dim": 20,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 3,
        "mlp_ratio": 3.0,
        "num_labels": 11,
    }
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(**({"num_labels": 1000} if full else small))
    )


def t5(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "d_model": 36,
        "d_kv": 10,
        "num_heads": 4,
        "d_ff": 84,
        "num_layers": 2,
        "relative_attention_num_buckets": 8,
    }
    config = transformers.T5Config(
        use_cache=False, pad_token_id=0, decoder_start_token_id=0, **({} if full else small)
    )
    return transformers.T5ForConditionalGeneration(config)


# -------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Example:
    """A model in eval mode with example inputs: positional as a tuple, by keyword as a dict."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """How to build one model at both sizes, and the parameters of the full one, as published."""

    build: Callable[..., nn.Module]
    parameters: int
    inputs: Callable[[bool], tuple[Tensor, ...] | dict[str, Tensor]]
    small: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)


def images(full: int, small: int, channels: int = 3) -> Callable[[bool], tuple[Tensor, ...]]:
    def inputs(is_small: bool) -> tuple[Tensor, ...]:
        size = small if is_small else full
        return (uniform_images(2, channels, size, size),)

    return inputs


def pixels(full: int, small: int) -> Callable[[bool], dict[str, Tensor]]:
    return lambda is_small: {"pixel_values": images(full, small)(is_small)[0]}


def text_lines(is_small: bool) -> tuple[Tensor, ...]:
    return (uniform_images(2, 1, 48, 36) if is_small else uniform_images(2, 1, 32, 100),)


def tokens(full: int) -> Callable[[bool], tuple[Tensor, ...]]:
    return lambda is_small: (random_tokens(2, *((9, 101) if is_small else (32, full))),)


def signals(is_small: bool) -> tuple[Tensor, ...]:
    return (uniform_images(2, *((9, 15) if is_small else (50, 80))),)


def token_ids(vocabulary: int, mask: bool = False) -> Callable[[bool], dict[str, Tensor]]:
    """Return token ids; with a mask, the second sequence ends in three padding tokens."""

    def inputs(is_small: bool) -> dict[str, Tensor]:
        length, size = (11, 101) if is_small else (64, vocabulary)
        named = {"input_ids": random_tokens(2, length, size)}
        if mask:
            named["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            named["attention_mask"][1, -3:] = 0
        return named

    return inputs


def two_texts(is_small: bool) -> dict[str, Tensor]:
    lengths, size = ((11, 7), 101) if is_small else ((64, 32), 32128)
    return {
        "input_ids": random_tokens(2, lengths[0], size, seed=1),
        "decoder_input_ids": random_tokens(2, lengths[1], size, seed=2),
    }


FULL = {"full": True}
ENTRIES: dict[str, Entry] = {
    "resnet50": Entry(
        resnet50, 25_557_032, images(224, 64), {"width": 16, "classes": 10, "layers": (2, 2, 1, 1)}
    ),
    "resnext50": Entry(
        resnext50,
        25_028_904,
        images(224, 64),
        {"width": 16, "classes": 10, "layers": (2, 1, 1, 1), "groups": 6, "group_width": 24},
    ),
    "mobilenet_v2": Entry(
        mobilenet_v2,
        3_504_872,
        images(224, 64),
        {"width": 0.5, "classes": 10, "head": 200, "repeats": False},
    ),
    "efficientnet_b0": Entry(
        efficientnet_b0,
        5_288_548,
        images(224, 64),
        {"width": 0.5, "classes": 10, "head": 200, "repeats": False},
    ),
    "densenet121": Entry(
        densenet121,
        7_978_856,
        images(224, 64),
        {"growth": 6, "layers": (2, 3, 2, 2), "stem": 20, "classes": 10},
    ),
    "shufflenet_v2": Entry(
        shufflenet_v2,
        2_278_604,
        images(224, 64),
        {"repeats": (2, 3, 2), "channels": (12, 20, 36, 56, 90), "classes": 10},
    ),
    "unet": Entry(unet, 31_037_698, images(256, 32), {"width": 10, "depth": 3}),
    "yolo_neck": Entry(
        yolo_neck,
        3_157_184,
        images(320, 64),
        {"widths": (8, 12, 20, 28, 44), "box": 16, "classes": 7},
    ),
    "pixel_shuffle_upsampler": Entry(
        pixel_shuffle_upsampler, 1_369_859, images(96, 14), {"width": 12, "blocks": 3}
    ),
    "crnn": Entry(
        crnn,
        8_722_981,
        text_lines,
        {"widths": (8, 12, 20, 28), "height": 48, "hidden": 18, "classes": 13},
    ),
    "lstm_net": Entry(
        lstm_net,
        4_525_204,
        tokens(10000),
        {"vocabulary": 101, "features": 20, "hidden": 24, "classes": 7},
    ),
    "gru_net": Entry(
        gru_net,
        1_807_017,
        signals,
        {"features": 15, "projected": 20, "hidden": 24, "classes": 7},
    ),
    "bert": Entry(bert, 109_482_240, token_ids(30522, mask=True), full=FULL),
    "gpt2": Entry(gpt2, 124_439_808, token_ids(50257), full=FULL),
    "llama": Entry(llama, 100_092_672, token_ids(32000), full=FULL),
    "vit": Entry(vit, 86_567_656, pixels(224, 30), full=FULL),
    "swin": Entry(swin, 28_288_354, pixels(224, 24), full=FULL),
    "t5": Entry(t5, 60_506_624, two_texts, full=FULL),
}
TRANSFORMERS = frozenset({"bert", "gpt2", "llama", "vit", "swin", "t5"})


def build(name: str, small: bool = True) -> nn.Module:
    """Return the bare module, as its constructor initialises it."""
    entry = ENTRIES[name]
    return entry.build(**(entry.small if small else entry.full))


def example(name: str, small: bool = True, seed: int = 0) -> Example:
    """Return the model with random parameters, in eval mode, and inputs at batch 2."""
    inputs = ENTRIES[name].inputs(small)
    model = randomise(build(name, small), inputs, seed)
    if name == "t5":  # its attention does not divide by the root of the head size
        with torch.no_grad():
            for module_name, module in model.named_modules():
                if module_name.endswith("Attention.q"):
                    module.weight.mul_(model.config.d_kv**-0.5)
    return Example(name, model, inputs)


ALL: dict[str, Callable[..., Example]] = {
    name: functools.partial(example, name) for name in ENTRIES
}
