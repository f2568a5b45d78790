"""Small networks that the benchmarks train themselves, on Fashion-MNIST and on scikit-learn's digits.

A trained network is kept in a folder and trained only where it is not there yet; all is seeded. Of
scikit-learn only a data file is read: `pip install --no-deps scikit-learn` will do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import normalised_part, train
from real_models import package_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphprune.demo.data import Sample
from graphprune.demo.main import accuracy
from graphprune.demo.network import ResNet8


class LeNet(nn.Sequential):
    """Two 5x5 convolutions of 32 and 64 channels, and 512 hidden units: 1.66 million parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip


class Vgg6(nn.Sequential):
    """Three pairs of 3x3 convolutions with batch norms, of 24, 48 and 96 channels."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 1
        for width in (24, 48, 96):
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, a depthwise 3x3, and a 1x1 back, with a residual."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = inputs * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, inputs, h, w]` to `[batch, outputs, h / stride, w / stride]`."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNet(nn.Sequential):
    """A stem, six inverted residuals of 16 to 48 channels and a 1x1 head: as MobileNetV2 is built.

    Source: Sandler et al., MobileNetV2, section 3 (arXiv 1801.04381), for images of 28 x 28.
    """

    def __init__(self) -> None:
        blocks = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1)]
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            *(InvertedResidual(*block) for block in blocks),
            nn.Conv2d(48, 192, 1, bias=False), nn.BatchNorm2d(192), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10),
        )  # fmt: skip


class DigitsNet(nn.Sequential):
    """Three 3x3 convolutions with batch norms for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a network is made.

    Attributes:
        network: its class.
        epochs: passes over the training images.
        peak: the highest learning rate.
        augment: whether the images are shifted and mirrored.

    """

    network: Callable[[], nn.Module]
    epochs: int
    peak: float
    augment: bool = True


RECIPES = {
    "resnet8": Recipe(ResNet8, 3, 0.2, augment=False),
    "lenet": Recipe(LeNet, 3, 0.05, augment=False),
    "vgg6": Recipe(Vgg6, 3, 0.2),
    "mobilenet": Recipe(MobileNet, 4, 0.2),
}


def trained(name: str, data: Path, cache: Path) -> nn.Module:
    """Return a network trained on Fashion-MNIST, from the cache or trained now and kept there."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = recipe.network()
    kept = cache / f"{name}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))
    else:
        images = normalised_part(data, "train")
        train(model, images, recipe.epochs, 0, peak=recipe.peak, augment=recipe.augment)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
    return model.eval()


def digits() -> tuple[Sample, Sample]:
    """Return scikit-learn's 1,797 digits as 1,297 to train on and 500 to test, pixels in 0..1."""
    rows = np.loadtxt(package_folder("sklearn") / "datasets/data/digits.csv.gz", delimiter=",")
    images = torch.tensor(rows[:, :64], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(rows[:, 64]).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split([1297, 500])
    return Sample(images[parts[0]], labels[parts[0]]), Sample(images[parts[1]], labels[parts[1]])


def trained_on_digits(epochs: int = 12) -> nn.Module:
    """Return a `DigitsNet` after a few seconds of training."""
    torch.manual_seed(0)
    model, (data, _) = DigitsNet(), digits()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = epochs * -(-len(data.labels) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for batch in data.batches(64, generator):
            loss = F.cross_entropy(model(batch.images), batch.labels)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train what is not in the cache and print what each network scores."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *-ubyte.gz files")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        started = time.perf_counter()
        model = trained(name, options.data, options.cache)
        size = sum(p.numel() for p in model.parameters())
        score = accuracy(model, normalised_part(options.data, "test"))
        seconds = time.perf_counter() - started
        print(f"{name}: {size:,} parameters, {score:.2%} of 10,000 test images ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
