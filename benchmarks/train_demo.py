"""Train the demonstration's network and write the two data files that graphprune ships.

`fashion_mnist.py` says where the images come from.

    python benchmarks/train_demo.py --data fashion/usr/share/datasets/fashion-mnist

The run is seeded. What it printed when it made the shipped files is in
results/demo_training.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from fashion_mnist import normalised_part, read_part, train
from safetensors.torch import save
from torch import Tensor

from graphprune.demo.data import Sample, pack
from graphprune.demo.main import accuracy
from graphprune.demo.network import ResNet8

SHIPPED = {"train": 1250, "test": 1000}  # images; just under a megabyte when packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=Path("graphprune/demo"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    shipped: dict[str, Tensor] = {}
    for split, count in SHIPPED.items():
        pixels, labels = read_part(options.data, split)
        shipped[f"{split}.images"] = pack(pixels[:count])
        shipped[f"{split}.labels"] = labels[:count].clone()
    (options.output / "fashion_mnist.safetensors").write_bytes(save(shipped))

    torch.manual_seed(options.seed)
    model = ResNet8()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    started = time.perf_counter()
    train(model, normalised_part(options.data, "train"), options.epochs, options.seed)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    (options.output / "resnet8.safetensors").write_bytes(save(model.state_dict()))

    test = normalised_part(options.data, "test")
    sample = Sample(test.images[: SHIPPED["test"]], test.labels[: SHIPPED["test"]])
    for name, part in (("test images", test), ("shipped test images", sample)):
        print(f"accuracy on {len(part.labels):,} {name}: {accuracy(model, part):.2%}")


if __name__ == "__main__":
    main()
