"""How analysis grows: a 7-billion-parameter decoder on the meta device, and nets of up to 4000 layers.

    python benchmarks/scaling.py --out benchmarks/results/scaling.md

A process a row; memory is what the process held at most, torch itself taking about 0.3 GiB of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune as gp

LAYERS = (125, 250, 500, 1000, 2000, 4000)


class Plain(nn.Module):
    """Layers one after the other, so that every layer is a group of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Residual(Plain):
    """Layers beside a stream of channels, so that all of them are one group."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x).relu() + x
        return self.head(x)


class Dense(nn.Module):
    """Blocks of layers that each read all layers before them in the block."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(16 + 4 * i, 4) for i in range(5)) for _ in range(layers // 6)
        )
        self.transitions = nn.ModuleList(nn.Linear(36, 16) for _ in range(layers // 6))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            for layer in block:
                x = torch.cat([x, layer(x).relu()], dim=1)
            x = transition(x)
        return x


def seven_billion() -> tuple[nn.Module, Any]:
    """Return a decoder of Llama 2's published sizes (arXiv 2307.09288) without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                vocab_size=32000,
            )
        )
    return model, {"input_ids": torch.ones(1, 128, dtype=torch.int64)}


NETS: dict[str, Callable[[int], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "dense blocks": Dense,
}


def measured(name: str, layers: int) -> dict[str, Any]:
    if name == "7B":
        model, inputs = seven_billion()
    else:
        model, inputs = NETS[name](layers), torch.ones(2, 16)
    gp.analyze(nn.Linear(4, 4), torch.ones(2, 4))  # what torch loads on first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    graph = gp.analyze(model.eval(), inputs)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "parameters": gp.count_parameters(model),
        "operators": len(graph.inference.steps),
        "groups": len(graph.groups),
        "seconds": seconds,
        "peak_gib": after / (1 << 20),
        "added_mib": (after - before) / (1 << 10),
    }


def row(name: str, layers: int) -> str:
    command = [sys.executable, __file__, "--one", name, str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"| {name} | {layers} | {done.stderr.strip().splitlines()[-1]} |"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return (
        f"| {name} | {layers} | {found['parameters']:,} | {found['operators']:,} | {found['groups']} "
        f"| {found['seconds']:.2f} | {1e3 * found['seconds'] / found['operators']:.2f} "
        f"| {found['peak_gib']:.2f} | {1e3 * found['added_mib'] / found['operators']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(measured(options.one[0], int(options.one[1]))))
        return
    lines = [
        "# Analysis: time and memory by size",
        "",
        f"`python benchmarks/scaling.py`, torch {torch.__version__}, one thread, "
        f"{time.strftime('%Y-%m-%d')}. Linear growth is a constant time and memory per operator.",
        "",
        "| net | layers | parameters | operators | groups | seconds | ms an operator | peak GiB "
        "| KiB an operator |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        row("7B", 32),
    ]
    lines += [row(name, layers) for name in NETS for layers in LAYERS]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
