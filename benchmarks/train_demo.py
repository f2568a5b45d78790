"""Train the demonstration's network and write the two data files that graphprune ships.

The images come from Debian's package of Fashion-MNIST, which any system with apt can unpack
without being root:

    apt-get download dataset-fashion-mnist
    dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python benchmarks/train_demo.py --data fashion/usr/share/datasets/fashion-mnist

The run is seeded. What it printed when it made the shipped files is in
results/demo_training.md.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from graphprune.demo.data import Sample, augmented, normalised, packed
from graphprune.demo.network import ResNet8

FILES = {"train": "train", "test": "t10k"}
SHIPPED = {"train": 1250, "test": 1000}  # images; just under a megabyte when packed
BATCH = 128


def read_idx(path: Path) -> Tensor:
    """Return the uint8 array of a gzipped IDX file."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = bytearray(raw[4 + 4 * dims :])
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def train(model: nn.Module, data: Sample, epochs: int, seed: int) -> None:
    """Train by SGD with one cycle of the learning rate, on shifted and mirrored images."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(data.labels) // BATCH)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.2, total_steps=steps, pct_start=0.25
    )
    model.train()
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in data.batches(BATCH, generator):
            loss = F.cross_entropy(model(augmented(batch.images, generator)), batch.labels)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(batch.labels)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch}: loss {total / len(data.labels):.4f}, {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Sample) -> float:
    right = [
        (model(images).argmax(1) == labels).sum()
        for images, labels in zip(
            torch.split(data.images, 1000), torch.split(data.labels, 1000), strict=True
        )
    ]
    return float(sum(right)) / len(data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=Path("graphprune/demo"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    data: dict[str, Sample] = {}
    shipped: dict[str, Tensor] = {}
    for split, prefix in FILES.items():
        pixels = read_idx(options.data / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(options.data / f"{prefix}-labels-idx1-ubyte.gz")
        data[split] = Sample(normalised(pixels), labels.long())
        shipped[f"{split}.images"] = packed(pixels[: SHIPPED[split]])
        shipped[f"{split}.labels"] = labels[: SHIPPED[split]].clone()
    (options.output / "fashion_mnist.safetensors").write_bytes(save(shipped))

    torch.manual_seed(options.seed)
    model = ResNet8()
    # channels last: a quarter faster on a CPU
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    started = time.perf_counter()
    train(model, data["train"], options.epochs, options.seed)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    (options.output / "resnet8.safetensors").write_bytes(save(model.state_dict()))

    test = data["test"]
    sample = Sample(test.images[: SHIPPED["test"]], test.labels[: SHIPPED["test"]])
    for name, part in (("test images", test), ("shipped test images", sample)):
        print(f"accuracy on {len(part.labels):,} {name}: {accuracy(model, part):.2%}")


if __name__ == "__main__":
    main()
