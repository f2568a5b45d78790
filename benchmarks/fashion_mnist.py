"""Fashion-MNIST from Debian's package, and how the benchmarks train small networks on it.

Any system with apt can unpack the package without being root:

    apt-get download dataset-fashion-mnist
    dpkg-deb -x dataset-fashion-mnist_*.deb fashion

`--data` of the benchmarks is then fashion/usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.demo.data import Sample, normalise

FILES = {"train": "train", "test": "t10k"}
BATCH = 128


def read_idx(path: Path) -> Tensor:
    """Return the uint8 array of a gzipped IDX file."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = bytearray(raw[4 + 4 * dims :])
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def read_part(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the pixels `[count, 28, 28]` and labels `[count]` of "train" or "test", uint8."""
    prefix = FILES[split]
    return (
        read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
    )


def normalised_part(folder: Path, split: str) -> Sample:
    """Return "train" or "test" as the networks take it."""
    pixels, labels = read_part(folder, split)
    return Sample(normalise(pixels), labels.long())


def train(
    model: nn.Module,
    data: Sample,
    epochs: int,
    seed: int,
    peak: float = 0.2,
    augment: bool = True,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Train by SGD with one cycle of the learning rate, on images that `augment` shifts and mirrors.

    `after_step` is called after each step of the optimiser.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(data.labels) // BATCH)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=peak, total_steps=steps, pct_start=0.25
    )
    # channels last: a quarter faster on a CPU
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in data.batches(BATCH, generator):
            images = augment(batch.images, generator) if augment else batch.images
            loss = F.cross_entropy(model(images), batch.labels)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            after_step()
            total += loss.item() * len(batch.labels)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch}: loss {total / len(data.labels):.4f}, {seconds:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
