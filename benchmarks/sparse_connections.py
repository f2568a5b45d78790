"""The Power of Sparsity in CNNs (arXiv 1702.06257) on Fashion-MNIST, with time that is measured.

    python benchmarks/sparse_connections.py --data FOLDER_OF_FASHION_MNIST --net vgg|resnet
    python benchmarks/sparse_connections.py --data FOLDER_OF_FASHION_MNIST --net vgg --quick  # minutes
    python benchmarks/sparse_connections.py --data FOLDER_OF_FASHION_MNIST --net vgg --report # table

The paper's ImageNet networks are out of reach; here are a VGG-style network of 48, 96 and 192 channels and
a ResNet-8 of 32, 64 and 128, on all 60,000 training images for three epochs. Accuracy on all 10,000
test images beside parameters, multiply-adds and latency in ONNX Runtime, for: the paper's baseline (a width
multiplier of the square root of the fraction), its random connections, the same shared by 8 and 32 filters,
expander graphs, grouped convolutions, connections cut from a trained network and trained on (for as long
again), drop-and-grow, and incremental training. Each run is kept in the cache and never repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_mnist import BATCH, normalised_part, train
from latency import header, timed
from torch import nn
from trainings import Job, Kept, Row, add_options, all_jobs, mean_and_spread, plot, with_spread

import graphprune as gp
from graphprune.demo.data import Sample
from graphprune.demo.main import accuracy
from graphprune.demo.network import ResNet8
from graphprune.onnx_export.providers import Runtime
from graphprune.sparsity.connections import masks_of
from graphprune.sparsity.connections.parametrization import register_masks
from graphprune.sparsity.connections.sites import sites_of

RESULTS = Path(__file__).parent / "results"
X = torch.zeros(1, 1, 28, 28)
IMAGES, EPOCHS, PEAK = 60_000, 3, 0.1
FRACTIONS = (0.02, 0.05, 0.1, 0.25, 0.5)
EXCHANGES, GROWTHS = 20, 8  # in one training

JOBS = {
    "dense": (1.0,),
    "width": FRACTIONS,
    "random, share 1": FRACTIONS,
    "random, share 8": (0.05, 0.1, 0.25),
    "random, share 32": (0.05, 0.1, 0.25),
    "expander, share 1": (0.05,),
    "grouped": (0.125, 0.25),
    "cut, share 1": (0.05, 0.25),
    "cut, share 32": (0.05, 0.25),
    "drop and grow, share 1": (0.05, 0.25),
    "incremental": (0.02,),
}
QUICK = {"dense": (1.0,), "width": (0.05,), "random, share 1": (0.05,), "random, share 32": (0.25,)}


def vgg(widths: tuple[int, ...] = (48, 96, 192)) -> nn.Module:
    """Return a stem of stride two, then five 3x3 convolutions with batch norms in three stages."""
    sizes = [(1, widths[0], 2), (widths[0], widths[0], 1)]
    for before, width in itertools.pairwise(widths):
        sizes += [(before, width, 1), (width, width, 1)]
    layers: list[nn.Module] = []
    for place, (before, width, stride) in enumerate(sizes):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if place in (1, 3) else [])]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet": lambda: ResNet8(widths=(32, 64, 128)),
}


def fresh(net: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[net]()


def grouped(model: nn.Module, fraction: float) -> nn.Module:
    """Connect each of 1 / fraction groups of filters with its own group of channels."""
    count = round(1 / fraction)
    blocks = np.eye(count, dtype=bool)
    register_masks(
        model,
        {
            site.weight: np.kron(
                blocks, np.ones((site.outputs // count, site.inputs // count), dtype=bool)
            )
            for site in sites_of(gp.analyze(model, X))
        },
    )
    return model


def trained(job: Job, data: Sample, epochs: int) -> nn.Module:
    """Return a network, trained."""
    net, method, fraction, seed = job
    model = fresh(net, seed)
    name, _, share = method.partition(", share ")
    options: dict[str, Any] = {"share": int(share or 1), "seed": seed}
    steps = epochs * -(-len(data.labels) // BATCH)
    after_step: Callable[[], object] = bool  # does nothing
    if name == "width":
        model = gp.width_multiplier(model, math.sqrt(fraction), X, seed=seed)
    elif name in ("random", "expander"):
        model = gp.connect_sparsely(model, fraction, X, pattern=name, **options)
    elif name == "grouped":
        model = grouped(model, fraction)
    elif name == "cut":
        learn(model, data, epochs, seed)
        model = gp.connect_sparsely(model, fraction, X, pattern="magnitude", **options)
    elif name == "drop and grow":
        model = gp.connect_sparsely(model, fraction, X, **options)
        exchange = gp.DropAndGrow(model, every=steps // EXCHANGES, until=3 * steps // 4)
        after_step = exchange.step
    elif name == "incremental":
        growth = gp.IncrementalConnections(
            model, X, start=fraction, every=steps // GROWTHS, seed=seed
        )
        model, after_step = growth.model, growth.step
    learn(model, data, epochs, seed, after_step)
    return model


def learn(
    model: nn.Module,
    data: Sample,
    epochs: int,
    seed: int,
    after_step: Callable[[], object] = bool,
) -> None:
    """Train where the data is, and come back to the processor."""
    model.to(data.images.device)
    with contextlib.redirect_stdout(io.StringIO()):
        train(model, data, epochs, seed, peak=PEAK, augment=False, after_step=after_step)
    model.cpu()


def counted(model: nn.Module) -> tuple[int, int]:
    """Return the parameters and multiply-adds of the connections that are on."""
    off = {name: 1 - each.connections.mean() for name, each in masks_of(model).items()}
    parameters, macs = gp.count_parameters(model), gp.count_macs(model, X)
    with contextlib.ExitStack() as stack:
        for name, share in off.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            size = layer.weight.numel()  # type: ignore[operator, union-attr]
            parameters -= round(share * size)

            def note(_: Any, __: Any, out: torch.Tensor, lost: float = share * size) -> None:
                nonlocal macs
                macs -= round(lost * out[0, 0].numel())

            stack.callback(layer.register_forward_hook(note).remove)
        with torch.no_grad():
            model.eval()(X)
    return parameters, macs


@functools.cache
def data_on(folder: Path, device: str, images: int) -> tuple[Sample, Sample]:
    """Return the first training images and all test images."""
    whole, test = (normalised_part(folder, part) for part in ("train", "test"))
    some = Sample(whole.images[:images], whole.labels[:images])
    return Sample(*(t.to(device) for t in some)), Sample(*(t.to(device) for t in test))


def work(folder: Path, device: str, quick: bool, job: Job) -> Row:
    """Train a network; return its accuracy in percent, its size and the seconds that it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, test = data_on(folder, device, 2_000 if quick else IMAGES)
    start = time.perf_counter()
    model = trained(job, data, 1 if quick else EPOCHS)
    parameters, macs = counted(model)
    score = 100 * accuracy(model.to(device), test)
    seconds = round(time.perf_counter() - start)
    return {"accuracy": score, "parameters": parameters, "macs": macs, "seconds": seconds}


# ------------------------------------------------------------------------------------ the report


def deployed(net: str, method: str, fraction: float) -> nn.Module:
    """Return what would be exported; its weights do not matter to the time."""
    model = fresh(net, 0).eval()
    name, _, share = method.partition(", share ")
    if name == "width":
        return gp.width_multiplier(model, math.sqrt(fraction), X).eval()
    if name in ("dense", "incremental") or share == "1":
        return model  # each filter reads other channels: computed with zeros
    if name == "grouped":
        model = grouped(model, fraction)
    else:
        pattern: Any = "magnitude" if name == "cut" else "random"
        model = gp.connect_sparsely(model, fraction, X, pattern=pattern, share=int(share))
    text = "absorb-constants, eliminate-dead-channels, fold-batch-norm, lower-sparse-connections"
    lowered: nn.Module = gp.Pipeline.parse(text)(model, X)
    return lowered


def latencies(net: str, found: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
    """Return the time of each over the dense network's."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, job in enumerate(found):
            exported = gp.export(deployed(net, *job), X, Path(folder) / f"{number}.onnx")
            files[f"{job[0]} {job[1]}"] = exported.path
        feeds = dict.fromkeys(files, exported.feed(X))
        times = timed(files, feeds, Runtime(), 2.0)
    dense = times["dense 1.0"].steadiest.median
    return {job: times[f"{job[0]} {job[1]}"].steadiest.median / dense for job in found}


def report(net: str, kept: Kept) -> None:
    by_job = kept.by_method(net)
    times = latencies(net, list(by_job))
    (dense,) = {row["parameters"] for row in by_job["dense", 1.0]}
    lines = [
        *header(f"Sparse connections, {net}, Fashion-MNIST", [Runtime()]),
        f"{IMAGES:,} images, {EPOCHS} epochs: means over the seeds and standard deviations. Time in "
        "ONNX Runtime, one image, one CPU thread, over the dense network's.",
        "",
        "| method | fraction | parameters | of dense | multiply-adds | time | accuracy | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    points: dict[str, list[tuple[float, float, float, float, float]]] = {}
    for (method, fraction), its in by_job.items():
        parameters, _ = mean_and_spread(its, "parameters")
        macs, _ = mean_and_spread(its, "macs")
        score, spread = mean_and_spread(its, "accuracy")
        lines.append(
            f"| {method} | {fraction:g} | {parameters:,.0f} | {parameters / dense:.1%} | "
            f"{macs / 1e6:.2f} M | {times[method, fraction]:.3f} | {with_spread(score, spread)} | "
            f"{len(its)} |"
        )
        point = parameters, macs, times[method, fraction], score, spread
        points.setdefault(method, []).append(point)
    (RESULTS / f"sparse_connections_{net}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    words = ("parameters", "multiply-adds", "time over the dense network's")
    plot(points, words, "accuracy, %", RESULTS / f"sparse_connections_{net}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *-ubyte.gz files")
    add_options(parser, NETS, seeds=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = Kept(options.cache / f"sparse_connections{'_quick' if options.quick else ''}.jsonl")
    if not options.report:
        jobs = all_jobs(
            options.net, QUICK if options.quick else JOBS, 1 if options.quick else options.seeds
        )
        job = functools.partial(work, options.data, options.device, options.quick)
        kept.run(job, jobs, options.workers)
    if not (options.quick or options.train):
        report(options.net, kept)


if __name__ == "__main__":
    main()
