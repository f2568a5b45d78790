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
from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.distributed.process_group import join_call
from graphprune.errors import CaptureError, InvalidRequestError, in_a_line
from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import Loss, ScoringContext
from graphprune.importance.criteria import scores
from graphprune.importance.gated_loss import GatedLoss
from graphprune.importance.vmap_or_loop import for_each
from graphprune.inference.infer import infer
from graphprune.utils import json_files
from graphprune.utils.atomic_files import check_target_path, try_lock, write_text
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
        group_scores: Scores = {}
        for group in graph.groups:
            order = self.order.get(group.name)
            if order is None or len(order) != group.size:
                raise InvalidRequestError(
                    f"the sensitivity scan knows no group {group.name!r} of {group.size} channels; scan "
                    "the model that is to be cut"
                )
            removed = (1 + np.arange(group.size)) / group.size
            # a loss that falls again must not rank a channel below one that goes before it
            growth = np.maximum.accumulate(np.asarray(self.losses[group.name]) - self.intact)
            scanned = np.concatenate([[0.0], self.ratios])
            channel_scores = np.interp(
                removed, scanned, np.concatenate([[0.0], np.maximum(growth, 0.0)])
            )
            # on from the last ratio as steeply as up to it
            beyond = removed > self.ratios[-1]
            channel_scores[beyond] *= removed[beyond] / self.ratios[-1]
            group_scores[group.name] = np.empty(group.size)
            group_scores[group.name][order] = channel_scores
        return group_scores

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
        target = check_target_path(path, ".svg", ".png", ".pdf")
        figure = new_figure(8, 5)
        axes = figure.add_subplot(xlabel="share of the group's channels removed", ylabel="loss")
        for name, losses in self.losses.items():
            label = printable(name).replace("$", r"\$")
            axes.plot([0, *self.ratios], [self.intact, *losses], marker=".", label=label)
        figure.legend(loc="outside right upper", fontsize="x-small")
        save_figure(figure, target)


@join_call()
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
    module, inputs = normalize_model_and_inputs(
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
    subject = ScoringContext(module, graph, batches, loss, seed)
    gated = GatedLoss(subject, differentiated=False)
    weighted = list(gated.weighted_batches())
    scores_by_group = scores(subject, importance)
    order = {
        name: np.argsort(group_scores, kind="stable").tolist()
        for name, group_scores in scores_by_group.items()
    }
    scan_arguments = (getattr(loss, "__qualname__", str(loss)), importance, shares, seed)
    # the digest is of all processes: they compute it together, or none does
    key = "" if cache is None else _digest(subject, scan_arguments)
    loss_cache = _Kept(cache if batches.ranks.rank == 0 else None, key)
    # all know what rank 0 has read, so that they measure the same groups
    loss_cache.losses.update(batches.ranks.gather(loss_cache.losses)[0])

    def measure_losses(gates: dict[str, Tensor], group: str, masks: Tensor) -> list[float]:
        total = torch.zeros(len(masks), dtype=torch.float64)
        for batch, weight in weighted:
            loss_of_mask = partial(_loss_with, gated, gates, group, batch.inputs, batch.target)
            with gated.naming(batch):
                total += weight * for_each(loss_of_mask, masks).double().cpu()
        losses: list[float] = batches.total(total).tolist()
        return losses

    open_gates = gated.ones()
    losses_by_group: dict[str, list[float]] = {}
    with torch.no_grad():
        intact = sum(w * float(gated(open_gates, b.inputs, b.target)) for b, w in weighted)
        for name in track(list(order), "scanning groups"):
            if len(loss_cache.losses.get(name, ())) != len(shares):
                # `[ratios, channels]`, in each row the first channels of the order closed
                masks = open_gates[name].repeat(len(shares), 1)
                for row, share in zip(masks, shares, strict=True):
                    row[order[name][: round(share * len(row))]] = 0.0
                loss_cache.add(name, measure_losses(open_gates, name, masks))
            losses_by_group[name] = loss_cache.losses[name]
        return Sensitivity(shares, float(batches.total(intact)), losses_by_group, order)


def _loss_with(
    gated: GatedLoss,
    open_gates: Mapping[str, Tensor],
    group: str,
    inputs: Any,
    target: Any,
    mask: Tensor,
) -> Tensor:
    return gated({**open_gates, group: mask}, inputs, target)


def _digest(subject: ScoringContext, scan_arguments: Any) -> str:
    """Return a hash of all that the losses of a scan depend on, in all processes; of the loss, its name."""
    scan_hash = hashlib.sha256(repr(scan_arguments).encode())
    for name, tensor in named_tensors(subject.model).items():
        digest(scan_hash, name, tensor)
    for number, batch in enumerate(subject.data):
        for tensor in batch.tensors():
            digest(scan_hash, f"{number}", tensor)
    return "".join(subject.data.ranks.gather(scan_hash.hexdigest()))


class _Kept:
    """Losses by group, in a JSON file by the digest of the scan, or in memory alone."""

    def __init__(self, path: str | Path | None, key: str) -> None:
        self.path = None if path is None else check_target_path(path)
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
        with try_lock(self.path.with_name(self.path.name + ".lock"), wait=_WAIT):
            if self.path.exists():
                for scan, losses_by_group in _scans(self.path).items():
                    self.scans[scan] = losses_by_group | self.scans.get(scan, {})
            self.losses = self.scans[self.key]
            write_text(self.path, json.dumps({"sensitivity": self.scans}))


def _scans(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return what a cache holds: losses by group, by scan."""
    try:
        content = json_files.require_object(json_files.read(path, finite=False), "it")
        scans = json_files.require_object(content.get("sensitivity"), "what it says of sensitivity")
        for scan, losses_by_group in scans.items():
            for group, losses in json_files.require_object(
                losses_by_group, f"scan {scan!r}"
            ).items():
                if not _are_numbers(losses):
                    raise ValueError(f"what it says of {group!r} is no list of losses")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{path} is not a cache of sensitivity scans: {error}; name another file"
        ) from error
    return scans


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)
