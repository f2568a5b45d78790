"""Published architectures at full size: slimmed, verified, run at another batch, exported, compared.

    python benchmarks/full_size.py --out benchmarks/results/full_size.md [MODEL ...]

A process a model. "equal" is the largest difference between PyTorch and ONNX Runtime over the largest
value, float32, at two batch sizes. With `--depth`, instead: the share of parameters left at 50 % of
channels, nothing aligned, channels along norms cut too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

RATIOS = (0.25, 0.5, 0.75)
REAL = ("efficientnet_lite0", "g2p")
DEPTH = ("resnet50", "mobilenet_v2", "densenet121", "bert", "vit")
LIMIT = 900  # seconds a process


def build(name: str) -> tuple[nn.Module, Any]:
    if name in REAL:
        import real_models

        model, inputs = getattr(real_models, name)()
        return model, inputs
    from tests import models

    example = models.ALL[name](small=False)
    return example.model, example.inputs


def measured(name: str) -> dict[str, Any]:
    import graphprune as gp
    from graphprune.utils.inputs import call

    model, inputs = build(name)
    row: dict[str, Any] = {"parameters": gp.count_parameters(model), "ratios": {}}
    for ratio in RATIOS:
        start = time.perf_counter()
        result = gp.slimmed(model, ratio, inputs)
        seconds = time.perf_counter() - start
        assert result.verification is not None
        call(result.model, gp.Inputs.of(inputs).repeat(2))
        with tempfile.TemporaryDirectory() as folder:
            exported = gp.export(result.model, inputs, Path(folder) / "slim.onnx")
        row["ratios"][str(ratio)] = {
            "form": result.form,
            "seconds": seconds,
            "left": gp.count_parameters(result.model) / row["parameters"],
            "verified": result.verification.difference,
            "batch_free": exported.batch_free,
            "equal": exported.difference,
        }
    return row


def depth(name: str) -> dict[str, Any]:
    import graphprune as gp

    if name == "bert":
        from tests.models import import_transformers

        transformers = import_transformers()
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig()).eval()
        inputs: Any = {"input_ids": torch.randint(0, 30000, (1, 32))}
    else:
        model, inputs = build(name)
    slim = gp.slim(model, 0.5, inputs, align=1, renormalised=True)
    left = gp.count_parameters(slim) / gp.count_parameters(model)
    return {"parameters": gp.count_parameters(model), "left": left}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| model | parameters | ratio | form | left | verified | ORT equal | batch free | slim s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | {row} |")
            continue
        if "left" in row:
            lines.append(f"| {name} | {row['parameters']:,} | 0.5 | | {row['left']:.1%} | | | | |")
        for ratio, cell in row.get("ratios", {}).items():
            lines.append(
                f"| {name} | {row['parameters']:,} | {ratio} | {cell['form']} | {cell['left']:.1%} "
                f"| {cell['verified']:.0e} | {cell['equal']:.0e} | {cell['batch_free']} "
                f"| {cell['seconds']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps((depth if options.depth else measured)(options.models[0])))
        return
    from tests import models

    names = options.models or (DEPTH if options.depth else (*models.ALL, *REAL))
    found: dict[str, Any] = {}
    for name in names:
        command = [sys.executable, __file__, "--one", name, *(["--depth"] if options.depth else [])]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT, check=False
            )
            out = done.stdout.strip().splitlines()
            error = (done.stderr.strip().splitlines() or ["killed"])[-1]
            found[name] = json.loads(out[-1]) if done.returncode == 0 else error
        except subprocess.TimeoutExpired:
            found[name] = f"not done in {LIMIT} s"
        print(name, found[name], flush=True)
        if options.out:
            title = f"# Full size, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n\n"
            options.out.write_text(title + table(found) + "\n")


if __name__ == "__main__":
    main()
