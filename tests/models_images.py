"""Networks on images: classifiers, and those of segmentation, detection and resolution."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
