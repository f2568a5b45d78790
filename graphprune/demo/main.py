"""The main job: make a trained network smaller, prove it, tune it, export it and time it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import graphprune
from graphprune.demo.data import Sample, augment, load_trained_network, sample
from graphprune.groups.cost import count_macs, count_parameters
from graphprune.utils.progress import no_bars

REPAIRED_ON = 512  # of the shipped training images
EPOCHS = 8  # passes over the shipped training images
BATCH = 64
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Row:
    """What became of the network at one ratio.

    Attributes:
        ratio: share of channels asked to go.
        removed: share that went; the widths that run fast meet few shares exactly.
        parameters: of the slim network.
        macs: of the slim network on one image; one is a multiply and an add.
        verified: whether the slim network was seen to compute what it must, before tuning.
        accuracy_original: share of the shipped test images that the original gets right.
        accuracy_cut: the same for the slim network as cut, verified but not repaired.
        accuracy_repaired: the same once its layers are fitted to the original's, without training.
        accuracy_tuned: the same after a short tuning of the repaired network.
        latency_ratio: seconds on one image in ONNX Runtime on one CPU thread, slim to original.
        onnx: where the tuned slim network was exported to.

    """

    ratio: float
    removed: float
    parameters: int
    macs: int
    verified: bool
    accuracy_original: float
    accuracy_cut: float
    accuracy_repaired: float
    accuracy_tuned: float
    latency_ratio: float
    onnx: Path


def run(
    output: Path = Path("demo-output"),
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    console: Console | None = None,
) -> list[Row]:
    """Slim the shipped network at each ratio, print a table and return its rows.

    Args:
        output: folder for the ONNX files; made if it is not there.
        ratios: shares of channels to remove.
        console: where to print; a new one on standard output by default.

    Raises:
        VerificationError: a slim network does not compute what it must.
        ExportError: an exported network disagrees with PyTorch.

    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    model, test = load_trained_network(), sample("test")
    original = accuracy(model, test)
    rows = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with _one_thread(), no_bars(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for ratio in ratios:
            say = partial(_describe, progress, task, ratio)
            rows.append(_run_at_ratio(model, original, ratio, output, say))
    console.print(_table(rows, model, test))
    console.print(f"ONNX files in {output}")
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread for a while.

    The network is small enough to lose little, the figures do not depend on the number of cores, and
    a busy machine does not stall: threads that wait for each other took eight times as long on one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _describe(progress: Progress, task: TaskID, ratio: float, step: str) -> None:
    """Say in the line of progress what is being done."""
    progress.update(task, description=f"{ratio:.0%} of the channels: {step}")


def _run_at_ratio(
    model: nn.Module, original: float, ratio: float, output: Path, say: Callable[[str], None]
) -> Row:
    """Do the job at one ratio."""
    train, test = sample("train"), sample("test")
    single_image = (test.images[:1],)
    say("slimming and verifying")
    with warnings.catch_warnings():  # the table says how many go
        warnings.filterwarnings("ignore", "asked to remove", graphprune.GraphPruneWarning)
        slimmed = graphprune.slimmed(model, ratio, example_inputs=(test.images[:8],))
    cut = accuracy(slimmed.model, test)
    say(f"repairing on {REPAIRED_ON} images without labels")
    images = train.images[:REPAIRED_ON].split(BATCH)
    slimmer = graphprune.slim(
        model, example_inputs=(test.images[:8],), plan=slimmed.plan, data=images, compensate=True
    )
    repaired = accuracy(slimmer, test)
    say(f"tuning on {len(train.labels):,} images")
    graphprune.finetune(
        slimmer, model, Augmented(train.images), epochs=EPOCHS, learning_rate=LEARNING_RATE
    )
    say("exporting to ONNX")
    exported = graphprune.export(
        slimmer, single_image, output / f"resnet8-{round(100 * ratio)}.onnx"
    )
    say("timing in ONNX Runtime")
    compared = graphprune.compare(model, slimmer, single_image, providers=["cpu"], seconds=1.0)
    return Row(
        ratio=ratio,
        removed=slimmed.plan.removed / sum(group.size for group in slimmed.graph.groups),
        parameters=count_parameters(slimmer),
        macs=count_macs(slimmer, single_image),
        verified=slimmed.verification is not None,
        accuracy_original=original,
        accuracy_cut=cut,
        accuracy_repaired=repaired,
        accuracy_tuned=accuracy(slimmer, test),
        latency_ratio=1 / compared.speedups()["cpu"],
        onnx=exported.path,
    )


class Augmented:
    """Images in batches, shifted and mirrored anew each time they are gone through; labels are not used.

    On so few images the original's logits say more than labels do.
    """

    def __init__(self, images: Tensor, seed: int = 0) -> None:
        self.data = Sample(images, torch.zeros(len(images)))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.data.images) // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the images in an order drawn anew."""
        for batch in self.data.batches(BATCH, self.generator):
            yield augment(batch.images, self.generator)


@torch.no_grad()
def accuracy(model: nn.Module, data: Sample) -> float:
    """Return the share of images whose largest logit is the label's."""
    correct = 0
    for images, labels in zip(
        torch.split(data.images, 1000), torch.split(data.labels, 1000), strict=True
    ):
        correct += int((model(images).argmax(1) == labels).sum())
    return correct / len(data.labels)


def _table(rows: Sequence[Row], model: nn.Module, test: Sample) -> Table:
    """Return the rows as a table of 80 columns, the original network first."""
    table = Table(
        title="ResNet-8 on Fashion-MNIST, slimmed by structural pruning",
        caption=f"accuracy on {len(test.labels):,} test images as cut, repaired without training, and "
        "tuned; latency of one image in ONNX Runtime on one CPU thread",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    accuracies = ("as cut", "repaired", "tuned")
    for name in ("channels", "params", "MACs", "verified", *accuracies, "latency"):
        table.add_column(name, justify="right", no_wrap=True)
    parameters, macs = count_parameters(model), count_macs(model, (test.images[:1],))
    original = f"{accuracy(model, test):.1%}"
    table.add_row("original", f"{parameters:,}", _millions(macs), "", original, "", "", "x 1.00")
    for row in rows:
        table.add_row(
            f"-{row.removed:.0%}",
            f"{row.parameters:,}",
            _millions(row.macs),
            "yes" if row.verified else "no",
            f"{row.accuracy_cut:.1%}",
            f"{row.accuracy_repaired:.1%}",
            f"{row.accuracy_tuned:.1%}",
            f"x {row.latency_ratio:.2f}",
        )
    return table


def _millions(count: int) -> str:
    """Return a count in millions."""
    return f"{count / 1e6:.2f} M"
