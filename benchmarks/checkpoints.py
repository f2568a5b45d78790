"""Checkpoints shrunk on disk: seconds of each step and the most memory that a process holds.

    python benchmarks/checkpoints.py

Writes Llama-shaped checkpoints of random weights in bfloat16, 4 GB for the largest, to a temporary folder;
plans and shrinks each in a process of its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from latency import header
from torch import Tensor

import graphprune as gp
from graphprune.checkpoint.writer import TensorToWrite, write_safetensors
from graphprune.onnx_export.providers import Runtime
from graphprune.utils.safetensors_blocks import INDEX, row_blocks

RESULTS = Path(__file__).parent / "results" / "checkpoints.md"
RATIO = 0.25
THREADS = 1  # threads that wait for each other on a busy machine would be most of the time
SHARD = 500_000_000  # bytes
TOKENS = {"input_ids": torch.tensor([[1, 5, 7, 2, 3, 9, 4, 8]])}

# Heads such that those that are left divide the width, as LlamaConfig wants it.
NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
SIZES = {
    "0.1B": (768, 2048, 12, 16, 16_000),
    "0.5B": (1536, 4096, 16, 16, 32_000),
    "1B": (2304, 6144, 15, 16, 32_000),
    "2B": (3072, 8192, 19, 32, 32_000),
    "70B": (8192, 28_672, 80, 64, 128_256),
}


def empty(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        sizes: dict[str, Any] = dict(zip(NAMES, SIZES[name], strict=True))
        config = LlamaConfig(**sizes, num_key_value_heads=8, dtype="bfloat16")
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def random_blocks(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    for start, stop in row_blocks(shape):
        block = torch.randn(stop - start, *shape[1:], generator=generator)
        yield (0.02 * block).bfloat16() if len(shape) > 1 else torch.ones(stop - start).bfloat16()


def write_checkpoint(name: str, folder: Path) -> None:
    """Write a checkpoint of random weights, of which no more than a block is held."""
    folder.mkdir()
    model, generator = empty(name), torch.Generator().manual_seed(0)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    shards: list[dict[str, TensorToWrite]] = [{}]
    for key, tensor in model.state_dict().items():
        if sum(each.bytes for each in shards[-1].values()) > SHARD:
            shards.append({})
        shape = tuple(tensor.shape)
        shards[-1][key] = TensorToWrite("BF16", shape, random_blocks(shape, generator))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(each.bytes for shard in shards for each in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def peak() -> float:
    """Return the most memory that this process has held so far, files it has mapped included, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count the parent's
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def timed(report: dict[str, Any], step: str, start: float) -> None:
    report[f"{step}, s"], report[f"{step}, MiB"] = time.perf_counter() - start, peak()


def shrink(name: str, folder: Path) -> dict[str, Any]:
    """Analyse, plan and shrink; return seconds, the memory until then, and bytes."""
    model = empty(name)
    report: dict[str, Any] = {"parameters": gp.count_parameters(model), "start, MiB": peak()}
    start = time.perf_counter()
    gp.analyze(model, TOKENS)
    timed(report, "analysis", start)
    start = time.perf_counter()
    weights = {} if name == "70B" else {"weights": folder / "source"}
    importance = "l2" if weights else "random"
    result = gp.slimmed(model, RATIO, TOKENS, importance=importance, **weights)  # type: ignore[arg-type]
    timed(report, "plan", start)
    report["slim"] = gp.count_parameters(result.model)
    if weights:
        start = time.perf_counter()
        done = gp.shrink_checkpoint(model, result.plan, folder / "source", folder / "slim", TOKENS)
        timed(report, "shrinking", start)
        result.plan.save(folder / "plan.json")
        report |= {
            "before": done.bytes_before,
            "after": done.bytes_after,
            "config": done.has_config,
        }
    return report


def equal(name: str, folder: Path) -> dict[str, Any]:
    """Say whether the slim checkpoint is what slimming in memory gives, bit for bit."""
    from transformers import LlamaForCausalLM

    source, target = (
        LlamaForCausalLM.from_pretrained(folder / part, dtype=torch.bfloat16)
        for part in ("source", "slim")
    )
    plan = gp.Plan.load(folder / "plan.json")
    in_memory = gp.slim(source, example_inputs=TOKENS, plan=plan, verify=False).state_dict()
    found = target.state_dict()
    return {
        "equal": found.keys() == in_memory.keys()
        and all(torch.equal(found[key], value) for key, value in in_memory.items())
    }


def generate(name: str, folder: Path) -> dict[str, Any]:
    """Load the slim checkpoint and generate a token."""
    from transformers import LlamaForCausalLM

    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder / "slim", dtype=torch.bfloat16)
    found = model.generate(TOKENS["input_ids"], max_new_tokens=1, min_new_tokens=1)
    report: dict[str, Any] = {"tokens": found.shape[1] - TOKENS["input_ids"].shape[1]}
    timed(report, "loading", start)
    return report


def in_a_process(what: str, name: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, what, name, str(folder)], check=True, stdout=subprocess.PIPE
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(what, name, report, file=sys.stderr)
    return report


def page(reports: dict[str, dict[str, Any]]) -> str:
    steps = ("analysis", "plan", "shrinking")
    lines = [
        *header("Checkpoints shrunk on disk", [Runtime()]),
        f"Llama-shaped checkpoints of random weights in bfloat16, {SHARD / 1e9:.1f} GB a file, a process",
        f"each: {RATIO:.0%} of the channels of each group go, ranked by `l2`. The model is built without",
        "weights and analysed; planned by `gp.slimmed(model, weights=source)`, which analyses it again,",
        "reads every weight and runs the slim model for its shapes; and shrunk by `gp.shrink_checkpoint`.",
        "Memory is the most that the process held until then (VmHWM), mapped files included; at the",
        "start it has imported torch and transformers and built the model. Of the last model there is no",
        f"checkpoint, only a plan by chance. {THREADS} thread, on a machine with other work.",
        "",
        "| model | parameters, M | slim, M | GB | slim, GB | analysis, s | plan, s | shrinking, s "
        "| start, MiB | analysed, MiB | planned, MiB | shrunk, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, report in reports.items():
        numbers = [report["parameters"] / 1e6, report["slim"] / 1e6]
        numbers += [report.get(key, math.nan) / 1e9 for key in ("before", "after")]
        numbers += [report.get(f"{step}, s", math.nan) for step in steps]
        memory = [report.get(f"{step}, MiB", math.nan) for step in ("start", *steps)]
        cells = [f"{number:,.0f}" for number in numbers[:2]]
        cells += [f"{number:.2f}" for number in numbers[2:4]]
        cells += [f"{number:.1f}" for number in numbers[4:]] + [
            f"{number:,.0f}" for number in memory
        ]
        lines.append(f"| {' | '.join([name, *cells])} |".replace("nan", ""))
    small, large = reports["0.1B"], reports["2B"]
    lines += [
        "",
        "- The slim 0.1B checkpoint is what `gp.slim` gives in memory, bit for bit: "
        f"{'yes' if small['equal'] else 'NO'}.",
        f"- The slim 2B checkpoint, loaded by `from_pretrained`, generated {large['tokens']} token, "
        f"{large['loading, s']:.1f} s from the start",
        f"  of loading; that process, which has all of its weights, held {large['loading, MiB']:,.0f} MiB.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    reports: dict[str, dict[str, Any]] = {}
    for name in SIZES:
        with tempfile.TemporaryDirectory() as held:
            folder = Path(held)
            if name != "70B":
                write_checkpoint(name, folder / "source")
            reports[name] = in_a_process("shrink", name, folder)
            if name == "0.1B":
                reports[name] |= in_a_process("equal", name, folder)
            if name == "2B":
                reports[name] |= in_a_process("generate", name, folder)
    RESULTS.write_text(page(reports))
    print(RESULTS.read_text())


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if len(sys.argv) > 1:
        steps = {"shrink": shrink, "equal": equal, "generate": generate}
        print(json.dumps(steps[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
