"""Scoring and repair by several processes: time against that of one, and what they send each other.

    python benchmarks/processes.py --out benchmarks/results/processes.md

Every process has one thread. One process and two take turns, several rounds, on the same data; a figure
is the median over the rounds, after a first call that is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.batches import batches_of
from graphprune.demo.network import ResNet8
from graphprune.distributed.process_group import join_call
from graphprune.importance import ScoringContext, scores

Loss = Callable[[Any, Tensor], Tensor]


def resnet8() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Loss]:
    """Return the demo's network and 1,024 images."""
    data = [(torch.randn(32, 1, 28, 28), torch.randint(10, (32,))) for _ in range(32)]
    return ResNet8().eval(), data, F.cross_entropy


def decoder() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Loss]:
    """Return a Llama-shaped decoder of 27 million parameters and 2,048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, vocab_size=16000,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    texts = [torch.randint(16000, (2, 128)) for _ in range(8)]

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), target[:, 1:].flatten())

    return LlamaForCausalLM(config).eval(), [(text, text) for text in texts], loss


NETWORKS = {"resnet8": resnet8, "decoder": decoder}
CRITERIA = {
    "resnet8": ("taylor", "fisher", "interpolative", "reconstruction"),
    "decoder": ("taylor", "interpolative"),
}


class Sent:
    """Counts what is sent: calls of the all-reduce and their bytes."""

    def __init__(self) -> None:
        self.calls, self.bytes, self.largest = 0, 0, 0
        self.all_reduce = dist.all_reduce
        dist.all_reduce = self  # type: ignore[assignment]

    def __call__(self, tensor: Tensor, **options: Any) -> Any:  # noqa: D102
        self.calls += 1
        self.bytes += tensor.nbytes
        self.largest = max(self.largest, tensor.nbytes)
        return self.all_reduce(tensor, **options)

    def taken(self) -> dict[str, int]:
        """Return the counts and begin anew."""
        found = {"calls": self.calls, "bytes": self.bytes, "largest": self.largest}
        self.calls = self.bytes = self.largest = 0
        return found


def work(name: str) -> dict[str, dict[str, Any]]:
    """Score by each criterion and repair; return seconds, and what was sent."""
    torch.manual_seed(0)
    model, data, loss = NETWORKS[name]()
    example = data[0][0]
    graph = gp.analyze(model, example)
    plan = gp.slimmed(model, 0.5, example, verify=False).plan
    sent = Sent()

    def score(criterion: str) -> None:
        with join_call():
            scores(ScoringContext(model, graph, batches_of(data), loss), criterion)

    def repair() -> None:
        gp.slim(model, example_inputs=example, plan=plan, data=data, compensate=True, verify=False)

    jobs = {criterion: (lambda c=criterion: score(c)) for criterion in CRITERIA[name]}
    found = {}
    for job, run in {**jobs, "repair": repair}.items():
        run()
        sent.taken()
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        run()
        found[job] = {"seconds": time.perf_counter() - began, **sent.taken()}
    return found


def measured(name: str, size: int) -> dict[str, dict[str, Any]]:
    """Return what `work` finds in the first of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--network", name, "--folder", folder]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([*command, "--rank", str(rank), "--size", str(size)], env=env)
            for rank in range(size)
        ]
        if any(process.wait() for process in started):
            raise RuntimeError(f"{name} failed in {size} processes")
        found: dict[str, dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def table(rounds: int) -> str:
    """Return the rows of all networks."""
    lines = [
        "| network | what | 1 process, s | 2 processes, s | ratio (of each round) | all-reduces | MB "
        "in all | MB at most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in NETWORKS:
        found: dict[int, list[dict[str, dict[str, Any]]]] = {1: [], 2: []}
        for _ in range(rounds):
            for size in found:
                found[size].append(measured(name, size))
        for job, sent in found[2][0].items():
            one, two = ([each[job]["seconds"] for each in found[size]] for size in (1, 2))
            ratios = [b / a for a, b in zip(one, two, strict=True)]
            a, b = statistics.median(one), statistics.median(two)
            lines.append(
                f"| {name} | {job} | {a:.2f} | {b:.2f} | **{b / a:.2f}** ({min(ratios):.2f} to "
                f"{max(ratios):.2f}) | {sent['calls']} | {sent['bytes'] / 1e6:.3g} | "
                f"{sent['largest'] / 1e6:.3g} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Do the work of one process, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int)
    asked = parser.parse_args()
    if asked.network:
        warnings.simplefilter("ignore", gp.GraphPruneWarning)
        torch.set_num_threads(1)
        if asked.size > 1:
            store = f"file://{asked.folder}/store"
            dist.init_process_group(
                "gloo", init_method=store, rank=asked.rank, world_size=asked.size
            )
        found = work(asked.network)
        if asked.rank == 0:
            (asked.folder / "found.json").write_text(json.dumps(found))
        if asked.size > 1:
            dist.destroy_process_group()
        return
    head = (
        "# Scoring and repair by two processes\n\n"
        f"`python benchmarks/processes.py`, {datetime.date.today()}, torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, gloo, one thread a process; medians of "
        f"{asked.rounds} rounds, one process and two in turns. What is sent: by each process, in float64. "
        "Every process traces the network for itself, but for taylor and fisher; the decoder takes 3 s."
        "\n\n"
    )
    page = head + table(asked.rounds) + "\n"
    if asked.out:
        asked.out.write_text(page)


if __name__ == "__main__":
    main()
