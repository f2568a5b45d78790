"""The demonstration's data, shipped in the package: trained weights and a sample of Fashion-MNIST.

Fashion-MNIST is Copyright (c) 2017 Zalando SE, used under the MIT licence, which is in
FASHION_MNIST_LICENSE.txt beside this file. `benchmarks/train_demo.py` wrote both data files.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from importlib import resources
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

from graphprune.demo.network import ResNet8

SIDE = 28
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# Of the 60,000 training images, as shares of full brightness.
_MEAN, _DEVIATION = 0.2860, 0.3530


class Sample(NamedTuple):
    """Images `[count, 1, 28, 28]`, normalised float32, and their labels `[count]`, int64."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Sample]:
        """Yield the sample once in batches of `size`, in an order drawn from `generator`."""
        for positions in torch.split(torch.randperm(len(self.labels), generator=generator), size):
            yield Sample(self.images[positions], self.labels[positions])


def load_trained_network() -> ResNet8:
    """Return the trained network in evaluation mode."""
    model = ResNet8()
    model.load_state_dict(load(_read_shipped("resnet8.safetensors")))
    return model.eval()


def sample(split: Literal["train", "test"]) -> Sample:
    """Return the first images of one part of Fashion-MNIST: 1,250 to train on or 1,000 to test."""
    tensors = load(_read_shipped("fashion_mnist.safetensors"))
    return Sample(normalise(unpack(tensors[f"{split}.images"])), tensors[f"{split}.labels"].long())


def normalise(pixels: Tensor) -> Tensor:
    """Return uint8 pixels `[count, 28, 28]` as the network's input `[count, 1, 28, 28]`."""
    return (pixels.unsqueeze(1).float() / 255 - _MEAN) / _DEVIATION


def pack(pixels: Tensor) -> Tensor:
    """Return uint8 pixels `[count, 28, 28]` compressed by zlib, as a uint8 tensor `[bytes]`."""
    compressed = zlib.compress(pixels.contiguous().numpy().tobytes(), level=9)
    return torch.frombuffer(bytearray(compressed), dtype=torch.uint8)


def unpack(compressed: Tensor) -> Tensor:
    """Return the pixels that `pack` compressed.

    >>> pixels = torch.arange(2 * 28 * 28).reshape(2, 28, 28).to(torch.uint8)
    >>> torch.equal(unpack(pack(pixels)), pixels)
    True
    """
    raw = zlib.decompress(compressed.numpy().tobytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, SIDE, SIDE)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images each shifted by up to 2 pixels and half of them mirrored."""
    count = len(images)
    offsets = torch.arange(SIDE)
    row_shifts, column_shifts = torch.randint(0, 5, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    rows = row_shifts + offsets
    # Into the padded image: 0 to 4 is a shift by -2 to 2. `[count, 28]` each.
    columns = column_shifts + torch.where(mirrored, offsets.flip(0), offsets)
    # Black, as normalised.
    padded = F.pad(images.squeeze(1), (2, 2, 2, 2), value=-_MEAN / _DEVIATION)
    # `[count, 1, 1]`, `[count, 28, 1]` and `[count, 1, 28]` give `[count, 28, 28]`.
    shifted = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.unsqueeze(1)


def _read_shipped(name: str) -> bytes:
    """Return the bytes of a data file of this package."""
    return (resources.files("graphprune.demo") / name).read_bytes()
