"""How long the analysis and the shrinking take, beside Torch-Pruning, on published architectures.

    pip install torch-pruning && pip install --no-deps torchvision==0.28.0 timm
    python benchmarks/analysis.py --out benchmarks/results/analysis.md

Each measurement is a process of its own: peak memory is that process's, time is the median of
`--repeats` in it after one warm-up, both tools in turn on the same machine. Torch-Pruning's time is
its README call: build the graph, plan, prune (the classifier ignored, 50 % of channels).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODELS = ("resnet50", "vit_b_16", "bert_base", "densenet121", "swin_t")
TOOLS = ("graphprune", "graphprune verified", "Torch-Pruning")
LIMIT = 240  # seconds a process


def build(name: str) -> tuple[nn.Module, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests import models

    if name in ("resnet50", "densenet121"):
        return getattr(models, name)().eval(), torch.randn(1, 3, 224, 224)
    if name == "bert_base":
        transformers = models.import_transformers()
        config = transformers.BertConfig()
        model = transformers.BertForSequenceClassification(config)
        return model.eval(), {"input_ids": torch.randint(0, 30000, (1, 128))}
    builders: dict[str, Callable[..., nn.Module]] = {"vit_b_16": models.vit, "swin_t": models.swin}
    return builders[name](full=True).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}


def with_graphprune(model: nn.Module, inputs: Any, verify: bool) -> nn.Module:
    import graphprune

    result: nn.Module = graphprune.slim(
        model, 0.5, inputs, align=1, renormalised=True, verify=verify
    )
    return result


def with_torch_pruning(model: nn.Module, inputs: Any) -> nn.Module:
    import torch_pruning

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[last],
        output_transform=lambda out: out.logits.sum() if hasattr(out, "logits") else out.sum(),
    )
    pruner.step()
    return model


def measure(name: str, tool: str, repeats: int) -> dict[str, float]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds = []
    for _ in range(repeats + 1):
        model, inputs = build(name)
        before = sum(p.numel() for p in model.parameters())
        start = time.perf_counter()
        if tool == "Torch-Pruning":
            slim = with_torch_pruning(model, inputs)
        else:
            slim = with_graphprune(model, inputs, tool.endswith("verified"))
        seconds.append(time.perf_counter() - start)
    left = sum(p.numel() for p in slim.parameters()) / before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak, "left": left}


def run(name: str, tool: str, repeats: int) -> dict[str, float] | str:
    """Measure in a process of its own; return why not where that fails."""
    command = [sys.executable, __file__, "--one", name, tool, "--repeats", str(repeats)]
    memory = 16 * 2**30
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:90]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | tool | seconds | of Torch-Pruning's | peak MiB | parameters left |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        other = row["Torch-Pruning"]
        for tool, value in row.items():
            if isinstance(value, str):
                lines.append(f"| {name} | {tool} | {value} | | | |")
                continue
            ratio = f"{value['seconds'] / other['seconds']:.2f}" if isinstance(other, dict) else "-"
            lines.append(
                f"| {name} | {tool} | {value['seconds']:.2f} | {ratio} | {value['peak_mib']:.0f} "
                f"| {value['left']:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.repeats)))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in options.models:
        found[name] = {tool: run(name, tool, options.repeats) for tool in TOOLS}
        print(name, found[name], flush=True)
    text = (
        f"# Analysis and shrinking at 50 % of channels\n\n`python benchmarks/analysis.py`, torch "
        f"{torch.__version__}, Python {platform.python_version()}, one thread, "
        f"{time.strftime('%Y-%m-%d')}.\n"
        f"Median of {options.repeats} after a warm-up, a process a cell.\n\n{table(found)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
