"""What the loss becomes when one group alone loses more and more of its channels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.calibration.batches import batches_of
from graphprune.capture.capture import prepared
from graphprune.distributed.process_group import together
from graphprune.errors import CaptureError, InvalidRequestError, in_a_line
from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import Loss, Subject
from graphprune.importance.criteria import scores
from graphprune.importance.gated_loss import GatedLoss
from graphprune.importance.vmap_or_loop import for_each
from graphprune.inference.infer import infer
from graphprune.utils import json_files
from graphprune.utils.atomic_files import alone, checked_target, write_text
from graphprune.utils.figures import new_figure, save_figure
from graphprune.utils.html import printable
from graphprune.utils.progress import track
from graphprune.utils.tensors import digest, named_tensors

# Seconds to wait for another process that writes to the same cache.
_WAIT = 10.0

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class Sensitivity:
    """A scan: the loss against the share of its channels that one group has lost.

    It can be passed as `importance=`: a channel then matters by how much the loss has grown once it
    and all channels of its group that go before it are gone.

    Attributes:
        ratios: shares of a group's channels.
        intact: the loss of the model as it is.
        losses: by group name, the loss at each ratio, all other groups being whole.
        order: by group name, its channels, those first that go first.

    """

    ratios: tuple[float, ...]
    intact: float
    losses: dict[str, list[float]]
    order: dict[str, list[int]]

    are_losses = True

    def __call__(self, model: nn.Module, graph: Dependencies) -> Scores:
        """Return the scores of a graph's channels.

        Raises:
            InvalidRequestError: the graph has other groups than the model that was scanned.

        """
        found: Scores = {}
        for group in graph.groups:
            order = self.order.get(group.name)
            if order is None or len(order) != group.size:
                raise InvalidRequestError(
                    f"the sensitivity scan knows no group {group.name!r} of {group.size} channels; scan "
                    "the model that is to be cut"
                )
            gone = (1 + np.arange(group.size)) / group.size
            grown = np.maximum.accumulate(np.asarray(self.losses[group.name]) - self.intact)
            known = np.concatenate([[0.0], self.ratios])
            values = np.interp(gone, known, np.concatenate([[0.0], np.maximum(grown, 0.0)]))
            beyond = gone > self.ratios[-1]  # on from the last ratio as steeply as up to it
            values[beyond] *= gone[beyond] / self.ratios[-1]
            found[group.name] = np.empty(group.size)
            found[group.name][order] = values
        return found

    def __str__(self) -> str:
        head = "".join(f"{ratio:>9.0%}" for ratio in self.ratios)
        width = max(map(len, self.losses), default=0)
        lines = [f"{'loss without':{width}}{head}   (intact: {self.intact:.4g})"]
        for name, losses in self.losses.items():
            lines.append(f"{name:{width}}" + "".join(f"{loss:>9.4g}" for loss in losses))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw a line a group into a file, by whose ending it is .svg, .png or .pdf.

        Raises:
            InvalidRequestError: the path ends otherwise or is in no folder, or matplotlib is not installed.

        """
        target = checked_target(path, ".svg", ".png", ".pdf")
        figure = new_figure(8, 5)
        axes = figure.add_subplot(xlabel="share of the group's channels removed", ylabel="loss")
        for name, losses in self.losses.items():
            label = printable(name).replace("$", r"\$")
            axes.plot([0, *self.ratios], [self.intact, *losses], marker=".", label=label)
        figure.legend(loc="outside right upper", fontsize="x-small")
        save_figure(figure, target)


@together()
@torch.inference_mode(False)
def sensitivity(
    model: Any,
    data: Any,
    loss: Loss,
    example_inputs: Any = None,
    *,
    importance: str = "l2",
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Sensitivity:
    """Scan a model: each group alone without the shares of its channels that matter least.

    Args:
        model: as for `slim`; it is not changed.
        data: batches of pairs of inputs and target.
        loss: of the model's output and a batch's target.
        example_inputs: as for `slim`; those of the first batch if not given.
        importance: the criterion that says which channels of a group go first.
        ratios: shares of a group's channels to remove, rising, each between 0 and 1.
        seed: for importance "random".
        cache: a JSON file that keeps what was measured for these weights, data and arguments, group by
            group, so that a scan that was cut off goes on and one that is done is not done again. Of
            the loss it knows the name alone. In a process group it is rank 0 that reads and writes it.

    Raises:
        InvalidRequestError: an argument makes no sense, or the file is something else.
        DistributedError: another process of the group failed.

    """
    shares = tuple(float(ratio) for ratio in ratios)
    if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
        raise InvalidRequestError(f"ratios={ratios!r} must rise from above 0 to below 1")
    batches = batches_of(data)
    module, inputs = prepared(
        model, batches[0].inputs if example_inputs is None else example_inputs
    )
    try:
        graph = Dependencies(infer(module, inputs))
    except CaptureError as failure:
        if example_inputs is not None:
            raise
        raise InvalidRequestError(
            f"the model does not run on {batches[0]}, {inputs}: {in_a_line(failure)}"
        ) from failure
    subject = Subject(module, graph, batches, loss, seed)
    gated = GatedLoss(subject, differentiated=False)
    weighted = list(gated.weighted())
    ranked = scores(subject, importance)
    order = {name: np.argsort(own, kind="stable").tolist() for name, own in ranked.items()}
    asked = (getattr(loss, "__qualname__", str(loss)), importance, shares, seed)
    key = "" if cache is None else _digest(subject, asked)
    kept = _Kept(cache if batches.ranks.rank == 0 else None, key)
    kept.losses.update(batches.ranks.gathered(kept.losses)[0])

    def measured(gates: dict[str, Tensor], group: str, masks: Tensor) -> list[float]:
        total = torch.zeros(len(masks), dtype=torch.float64)
        for batch, weight in weighted:
            one = partial(_loss_with, gated, gates, group, batch.inputs, batch.target)
            with gated.naming(batch):
                total += weight * for_each(one, masks).double().cpu()
        losses: list[float] = batches.total(total).tolist()
        return losses

    ones = gated.ones()
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        intact = sum(w * float(gated(ones, b.inputs, b.target)) for b, w in weighted)
        for name in track(list(order), "scanning groups"):
            if len(kept.losses.get(name, ())) != len(shares):
                masks = ones[name].repeat(len(shares), 1)
                for row, share in zip(masks, shares, strict=True):
                    row[order[name][: round(share * len(row))]] = 0.0
                kept.add(name, measured(ones, name, masks))
            found[name] = kept.losses[name]
        return Sensitivity(shares, float(batches.total(intact)), found, order)


def _loss_with(
    gated: GatedLoss, ones: Mapping[str, Tensor], group: str, inputs: Any, target: Any, mask: Tensor
) -> Tensor:
    return gated({**ones, group: mask}, inputs, target)


def _digest(subject: Subject, asked: Any) -> str:
    """Return a hash of all that the losses of a scan depend on, in all processes; of the loss, its name."""
    seen = hashlib.sha256(repr(asked).encode())
    for name, tensor in named_tensors(subject.model).items():
        digest(seen, name, tensor)
    for number, batch in enumerate(subject.data):
        for tensor in batch.tensors():
            digest(seen, f"{number}", tensor)
    return "".join(subject.data.ranks.gathered(seen.hexdigest()))


class _Kept:
    """Losses by group, in a JSON file by the digest of the scan, or in memory alone."""

    def __init__(self, path: str | Path | None, key: str) -> None:
        self.path = None if path is None else checked_target(path)
        self.scans: dict[str, dict[str, list[float]]] = {}
        if self.path is not None and self.path.exists():
            self.scans = _scans(self.path)
        self.key = key
        self.losses = self.scans.setdefault(key, {})

    def add(self, group: str, losses: list[float]) -> None:
        """Keep the losses of a group, beside what others have written meanwhile."""
        self.losses[group] = losses
        if self.path is None:
            return
        with alone(self.path.with_name(self.path.name + ".lock"), wait=_WAIT):
            if self.path.exists():
                for scan, found in _scans(self.path).items():
                    self.scans[scan] = found | self.scans.get(scan, {})
            self.losses = self.scans[self.key]
            write_text(self.path, json.dumps({"sensitivity": self.scans}))


def _scans(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return what a cache holds: losses by group, by scan."""
    try:
        content = json_files.mapping(json_files.read(path, finite=False), "it")
        scans = json_files.mapping(content.get("sensitivity"), "what it says of sensitivity")
        for scan, found in scans.items():
            for group, losses in json_files.mapping(found, f"scan {scan!r}").items():
                if not _are_numbers(losses):
                    raise ValueError(f"what it says of {group!r} is no list of losses")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{path} is not a cache of sensitivity scans: {error}; name another file"
        ) from error
    return scans


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)
