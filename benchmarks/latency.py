"""Latency in ONNX Runtime: against the MACs that are left, against a target, on every provider.

    python benchmarks/latency.py ratios     # 5 % to 95 % of channels: time beside MACs
    python benchmarks/latency.py targets    # of="latency" at 0.3 and 0.6, timed by a process of its own
    python benchmarks/latency.py providers --provider cuda --provider cuda-tf32 --provider cuda-float16

Each writes a table under benchmarks/results. All sides of a comparison take turns in one run; times are
medians, on one CPU thread of processor time. With `--quick`, small versions of the networks, to see that
it works. EfficientNet-Lite0 needs two packages: see real_models.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

RESULTS = Path(__file__).parent / "results"
RATIOS = [round(0.05 * step, 2) for step in range(1, 20)]
PROVIDER_RATIOS = (0.0, 0.25, 0.5, 0.75)
BATCHES = (1, 8, 64)
HALF_ALIGN = 8  # what NVIDIA's float16 kernels want channels to be a multiple of


def one_sample(name: str, quick: bool) -> tuple[nn.Module, Any]:
    """Return a network and inputs for one sample."""
    import graphprune as gp

    if name == "efficientnet_lite0":
        import real_models

        model, inputs = real_models.efficientnet_lite0()
    else:
        from tests import models

        example = models.ALL[name](small=quick)
        model, inputs = example.model, example.inputs
    return model, gp.Inputs.of(inputs).map(lambda tensor: tensor[:1])


def header(title: str, runtimes: Sequence[Any]) -> list[str]:
    from graphprune.onnx_export.providers import describe_machine

    about = describe_machine(*runtimes)
    numbers = [f"onnxruntime {onnxruntime.__version__}", f"torch {torch.__version__}"]
    where = ", ".join([*about.values(), *numbers, f"graphprune {version('graphprune')}"])
    return [f"# {title}", "", f"{where}, {time.strftime('%Y-%m-%d')}", ""]


def timed(files: dict[str, Path], feeds: dict[str, Any], runtime: Any, seconds: float) -> Any:
    from graphprune.runtime.timing import time_onnx

    return time_onnx(files, feeds, runtimes=[runtime], seconds=seconds)[str(runtime)]


# ------------------------------------------------------------------------- time against MACs


def ratios(options: argparse.Namespace) -> list[str]:
    import graphprune as gp
    from graphprune.onnx_export.providers import Runtime

    runtime = Runtime()
    lines = header("Latency against MACs, one image, one CPU thread", [runtime])
    for name in options.models or ["resnet50", "mobilenet_v2"]:
        model, inputs = one_sample(name, options.quick)
        macs = gp.count_macs(model, inputs)
        lines += [
            "",
            f"## {name}",
            "",
            "| channels removed | MACs left | time left | time / MACs |",
        ]
        lines += ["| --- | --- | --- | --- |"]
        with tempfile.TemporaryDirectory() as folder:
            original = gp.export(model, inputs, Path(folder) / "original.onnx")
            feed = original.feed(inputs)
            for ratio in RATIOS:
                slim = gp.slim(model, ratio, inputs)
                exported = gp.export(slim, inputs, Path(folder) / "slim.onnx")
                files = {"original": original.path, "slim": exported.path}
                found = timed(files, dict.fromkeys(files, feed), runtime, options.seconds)
                time_left = found["slim"].steadiest.median / found["original"].steadiest.median
                macs_left = gp.count_macs(slim, inputs) / macs
                row = (
                    f"{ratio:.0%} | {macs_left:.3f} | {time_left:.3f} | {time_left / macs_left:.2f}"
                )
                lines.append(f"| {row} |")
                print(name, row, flush=True)
    return lines


# --------------------------------------------------------------------------- a latency as target


def targets(options: argparse.Namespace) -> list[str]:
    import graphprune as gp
    from graphprune.onnx_export.providers import Runtime

    lines = header(
        'of="latency", one sample, one CPU thread, timed by a process of its own', [Runtime()]
    )
    lines += [
        "| model | time to remove | left, as slim measured | left, as timed again | off target | s |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    names = ["resnet50", "mobilenet_v2", "efficientnet_lite0", "bert"]
    for name in options.models or names:
        model, inputs = one_sample(name, options.quick)
        for ratio in (0.3, 0.6):
            start = time.perf_counter()
            result = gp.slimmed(model, ratio, inputs, of="latency")
            seconds = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as folder:
                gp.export(model, inputs, Path(folder) / "original.onnx")
                gp.export(result.model, inputs, Path(folder) / "slim.onnx")
                command = [
                    sys.executable,
                    __file__,
                    "again",
                    folder,
                    "--seconds",
                    "10",
                    "--model",
                    name,
                ]
                command += ["--quick"] if options.quick else []
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            again = json.loads(done.stdout.splitlines()[-1])
            assert result.latency is not None
            claimed = result.latency.slim / result.latency.original
            off = again / (1 - ratio) - 1
            row = f"{name} | {ratio:.0%} | {claimed:.3f} | {again:.3f} | {off:+.1%} | {seconds:.0f}"
            lines.append(f"| {row} |")
            print(row, flush=True)
    return lines


def again(options: argparse.Namespace) -> None:
    """Print how much time the slim file of a folder takes, of what the original takes."""
    from graphprune.onnx_export.providers import Runtime

    _, inputs = one_sample(options.models[0], options.quick)
    folder = Path(options.folder)
    names = [
        value.name for value in onnxruntime.InferenceSession(folder / "slim.onnx").get_inputs()
    ]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs.tensors()), strict=True))
    files = {name: folder / f"{name}.onnx" for name in ("original", "slim")}
    found = timed(files, dict.fromkeys(files, feed), Runtime(), options.seconds)
    print(found["slim"].steadiest.median / found["original"].steadiest.median)


# ------------------------------------------------------------------------------- every provider


def prepare(name: str, ratio: float, quick: bool, folder: Path, half: bool) -> tuple[Path, int]:
    """Write a network without some channels as an ONNX file; return it and its MACs on one sample."""
    import graphprune as gp
    from graphprune.onnx_export.providers import convert_precision

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, inputs = one_sample(name, quick)
    slim = gp.slim(model, ratio, inputs, align=HALF_ALIGN, verify=False) if ratio else model
    path = folder / f"{name}-{ratio}.onnx"
    gp.export(slim, inputs, path)
    if half:
        convert_precision(path, "float16")
    return path, gp.count_macs(slim, inputs)


def providers(options: argparse.Namespace) -> list[str]:
    from graphprune.onnx_export.providers import Runtime, default_runtimes

    runtimes = [Runtime.of(each) for each in options.provider] or default_runtimes()
    names = options.models or ["resnet50", "mobilenet_v2", "vit", "bert", "unet"]
    lines = header("Latency and MACs on providers of ONNX Runtime", runtimes)
    lines += [
        "Time left and, in brackets, time over MACs left; first the original's median milliseconds. ",
        f"Channels are multiples of {HALF_ALIGN}.",
        "",
        "| model | runtime | batch | original ms | 25 % of channels removed | 50 % | 75 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(name, ratio) for name in names for ratio in PROVIDER_RATIOS]
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            half = any(runtime.precision == "float16" for runtime in runtimes)
            ready = [pool.submit(prepare, *job, options.quick, Path(folder), half) for job in jobs]
            made = {job: each.result() for job, each in zip(jobs, ready, strict=True)}
        print("files are ready", flush=True)
        for name in names:
            _, inputs = one_sample(name, options.quick)
            for runtime, batch, found in each_batch(name, inputs, runtimes, made, options):
                whole = found["0.0"].steadiest.median
                cells = []
                for ratio in PROVIDER_RATIOS[1:]:
                    left = found[str(ratio)].steadiest.median / whole
                    macs = made[name, ratio][1] / made[name, 0.0][1]
                    cells.append(f"{left:.2f} ({left / macs:.2f})")
                row = f"{name} | {runtime} | {batch} | {whole * 1e3:.3g} | {' | '.join(cells)}"
                lines.append(f"| {row} |")
                print(row, flush=True)
                options.out.write_text("\n".join(lines) + "\n")
    return lines


def each_batch(
    name: str, inputs: Any, runtimes: Sequence[Any], made: Any, options: argparse.Namespace
) -> Iterator[tuple[Any, int, Any]]:
    """Yield runtime, batch and the latency of each ratio's file."""
    first = onnxruntime.InferenceSession(made[name, 0.0][0], providers=["CPUExecutionProvider"])
    names = [value.name for value in first.get_inputs()]
    files = {str(ratio): made[name, ratio][0] for ratio in PROVIDER_RATIOS}
    for runtime in runtimes:
        for batch in options.batches:
            arrays = [np.repeat(tensor.numpy(), batch, 0) for tensor in inputs.tensors()]
            feed = dict(zip(names, arrays, strict=True))
            yield runtime, batch, timed(files, dict.fromkeys(files, feed), runtime, options.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["ratios", "targets", "again", "providers"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--model", dest="models", action="append")
    parser.add_argument("--provider", action="append", default=[])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--jobs", type=int, default=1, help="processes that make files")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each file's timing")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.command == "again":
        again(options)
        return
    options.out = options.out or RESULTS / f"latency_{options.command}.md"
    lines = {"ratios": ratios, "targets": targets, "providers": providers}[options.command](options)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
