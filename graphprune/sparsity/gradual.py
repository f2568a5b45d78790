"""Weights of recurrent and linear layers that become zero for good while a model trains.

Sources: Narang et al., Exploring Sparsity in Recurrent Neural Networks (arXiv 1704.05119); for
blocks, Narang et al., Block-Sparse Recurrent Neural Networks (arXiv 1711.02782); for the
cubic schedule, Zhu and Gupta, To Prune, or Not to Prune (arXiv 1710.01878).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError
from graphprune.utils.tensors import parameter_names

Schedule: TypeAlias = Literal["threshold", "cubic", "hard"]
Kind: TypeAlias = Literal["recurrent", "linear"]

QUANTILE = 0.9  # of the absolute weights of a dense model, which the threshold grows to

_GATES = {
    nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1, nn.Linear: 1,
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """A weight that is pruned, in blocks; gates stand one above the other, no block is in two of them."""

    name: str
    weight: nn.Parameter
    kind: Kind
    gates: int
    block: tuple[int, int]

    def scores(self) -> Tensor:
        """Return the largest absolute weight of each block, `[gates, blocks down, blocks across]`."""
        # `[gates, 1, rows, columns]`, as images of one channel for max_pool2d
        by_gate = self.weight.detach().abs().unflatten(0, (self.gates, -1)).unsqueeze(1)
        return F.max_pool2d(by_gate, self.block, self.block, ceil_mode=True).squeeze(1)

    def norms(self) -> Tensor:
        """Return the Euclidean norm of each block, as `scores` are, with a gradient; none is quite zero."""
        by_gate = self.weight.unflatten(0, (self.gates, -1))
        down, across = self.block
        # zeros fill up the last blocks: -5 % 4 is 3, and F.pad begins with the last dimension
        padded = F.pad(by_gate, (0, -by_gate.shape[2] % across, 0, -by_gate.shape[1] % down))
        # `[gates, blocks down, down, blocks across, across]`
        by_block = padded.unflatten(2, (-1, across)).unflatten(1, (-1, down))
        # the smallest number keeps the gradient of a block that is empty finite
        squares: Tensor = by_block.square().sum((2, 4))
        return (squares + torch.finfo(padded.dtype).tiny).sqrt()

    def spread(self, blocks: Tensor) -> Tensor:
        """Return what is said of each block for each weight, blocks at the ends being smaller."""
        height, width = len(self.weight) // self.gates, self.weight.shape[1]
        down = blocks.repeat_interleave(self.block[0], 1)[:, :height]
        return down.repeat_interleave(self.block[1], 2)[:, :, :width].flatten(0, 1)


def mask_without_lowest(scores: Tensor, count: int, balanced: bool = False) -> Tensor:
    """Return the mask of all scores but that many of the lowest; of equal ones the first go.

    Args:
        scores: of blocks, the last dimension being the blocks of a row.
        count: how many go.
        balanced: as many go of each row, and one stays in each at least; up to one more a row than asked.

    """
    # unless balanced all scores are one row; `count` is of all rows together, rounded up for each
    rows = scores.flatten(0, -2) if balanced else scores.view(1, -1)
    count_per_row = -(-count // len(rows))
    lowest = rows.argsort(dim=1, stable=True)[
        :, : min(count_per_row, rows.shape[1] - 1) if balanced else count_per_row
    ]
    stays = torch.ones_like(rows, dtype=torch.bool).scatter(1, lowest, False)
    return stays.view_as(scores)


class GradualSparsity:
    """Prunes recurrent and linear layers during their first training, at no cost in training time.

    Call `step` after each step of the optimiser. It multiplies the weights by their masks, and every so
    many steps prunes more: what is zero stays zero. Biases, norms and convolutions are left alone. With
    blocks, a whole block goes by its largest weight, which is what runs fast afterwards.

    Schedules: "threshold", the paper's: weights below a threshold go, which grows linearly between `start`
    and `ramp`, faster between `ramp` and `end`, and is the `QUANTILE` of a dense model's absolute weights
    in the end; how many go follows from how the weights change. "cubic": the fraction that is gone grows to
    `sparsity`, fast at first. "hard": that fraction goes at once, at `end`.

    The paper starts after one epoch, ramps at a quarter and ends at half of all epochs.

    Attributes:
        steps: how many were taken.
        masks: by the name of the weight, which blocks are left.

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int,
        end: int,
        ramp: int | None = None,
        every: int = 100,
        schedule: Schedule = "threshold",
        sparsity: float = 0.9,
        slope_ratio: float = 1.5,
        block: tuple[int, int] = (1, 1),
        balanced: bool = False,
        reference: nn.Module | None = None,
        by_layer: bool = False,
        most: float = 0.99,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        """Choose the weights and take the measure of them.

        Args:
            model: in training; holds nn.RNN, nn.LSTM, nn.GRU, their cells or nn.Linear.
            start: the step after which pruning starts.
            end: the step at which it ends.
            ramp: the step at which the threshold grows faster; the middle of both by default.
            every: steps from one pruning to the next.
            schedule: "threshold", "cubic" or "hard".
            sparsity: the fraction that is gone in the end; not for "threshold".
            slope_ratio: of the second slope of the threshold to the first; the paper takes 1.5 to 2.
            block: rows and columns of what goes together.
            balanced: as many blocks are left in each row of blocks, which runs fastest; with the
                threshold, that many of all blocks as are below it go, the lowest of each row.
            reference: a dense model of the same names whose weights the threshold grows to, trained
                at best; the model as it is by default.
            by_layer: take that measure of each weight by itself, not of all recurrent and of all linear
                ones together.
            most: fraction of each weight's blocks that may go at most, whatever the threshold.
            include: globs of names of weights to prune.
            exclude: globs of names of weights to leave.

        Raises:
            InvalidRequestError: an argument makes no sense, no weight is chosen, or those of the
                reference are zero.

        """
        ramp = (start + end) // 2 if ramp is None else ramp
        if every < 1 or not 0 <= start < ramp <= end:
            raise InvalidRequestError(
                f"start={start}, ramp={ramp}, end={end} and every={every} must be steps with 0 <= start < "
                "ramp <= end and every from 1"
            )
        if schedule not in get_args(Schedule):
            raise InvalidRequestError(
                f"schedule={schedule!r} must be 'threshold', 'cubic' or 'hard'"
            )
        if not (0 < sparsity < 1 and 0 < most < 1 and slope_ratio > 0 and min(block) >= 1):
            raise InvalidRequestError(
                f"sparsity={sparsity} and most={most} must be between 0 and 1, slope_ratio={slope_ratio} "
                f"above 0, and block={block} rows and columns, 1 or more"
            )
        self.start, self.ramp, self.end, self.every = start, ramp, end, every
        self.schedule, self.sparsity, self.slope_ratio, self.most = (
            schedule, sparsity, slope_ratio, most,
        )  # fmt: skip
        self.balanced = balanced
        self.steps = 0
        self._matrices = [
            matrix
            for matrix in _matrices(model, block)
            if any(fnmatchcase(matrix.name, pattern) for pattern in include)
            and not any(fnmatchcase(matrix.name, pattern) for pattern in exclude)
        ]
        if not self._matrices:
            raise InvalidRequestError(
                f"{type(model).__name__} has no weight of a recurrent or linear layer to prune that "
                f"include={tuple(include)} and exclude={tuple(exclude)} choose"
            )
        self.masks = {
            matrix.name: torch.ones_like(matrix.scores(), dtype=torch.bool)
            for matrix in self._matrices
        }
        self._slopes: dict[str, float] = {}
        if schedule == "threshold":
            end_thresholds = _quantiles(
                self._matrices, parameter_names(reference or model), by_layer
            )
            # ramp - start steps at the slope and end - ramp at slope_ratio times it add up to the quantile
            # (the paper's algorithm 1 has 3, for a ratio of 1.5); the largest weight of a block is larger
            # than one weight, by about this power of its size
            span = 2 * (ramp - start) + 2 * slope_ratio * (end - ramp)
            scale = prod(block) ** 0.25
            self._slopes = {
                name: 2 * q * every * scale / span for name, q in end_thresholds.items()
            }

    def threshold(self, name: str) -> float:
        """Return the threshold of a weight at the present step, before `end`.

        Source: arXiv 1704.05119, equation 1 and algorithm 1.
        """
        slope = self._slopes[name]
        grown = slope * (min(self.steps, self.ramp) - self.start + 1)
        if self.steps >= self.ramp:
            grown += self.slope_ratio * slope * (self.steps - self.ramp + 1)
        return grown / self.every

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimiser, prune if it is time, and hold at zero what is gone."""
        self.steps += 1
        is_due = self._is_due()
        for matrix in self._matrices:
            if is_due:
                self._prune(matrix)
            matrix.weight.mul_(matrix.spread(self.masks[matrix.name]))

    def _is_due(self) -> bool:
        if self.schedule == "hard":
            return self.steps == self.end
        if self.schedule == "cubic" and self.steps == self.end:
            return True
        return self.start < self.steps < self.end and self.steps % self.every == 0

    def _prune(self, matrix: Matrix) -> None:
        mask, scores = self.masks[matrix.name], matrix.scores()
        if self.schedule == "threshold":
            gone_count = int((mask & (scores < self.threshold(matrix.name))).sum() + (~mask).sum())
        else:
            progress = min(1.0, (self.steps - self.start) / (self.end - self.start))
            ramp_share = 1.0 if self.schedule == "hard" else 1 - (1 - progress) ** 3
            gone_count = round(self.sparsity * ramp_share * mask.numel())
        # never fewer than before: weights that grow past a threshold do not bring blocks back
        gone_count = min(max(gone_count, int((~mask).sum())), int(self.most * mask.numel()))
        # what is gone gets a score below all absolute values, so that it goes first
        self.masks[matrix.name] = mask_without_lowest(
            scores.masked_fill(~mask, -1.0), gone_count, self.balanced
        )

    def lasso(self) -> Tensor:
        """Return the sum over blocks of the Euclidean norms of their weights, with a gradient.

        To be added to a loss, times a strength: it empties blocks, so that pruning them costs less. Each
        norm is weighted by the square root of the block's size.

        Source: group lasso, Narang et al. (arXiv 1711.02782).
        """
        return torch.stack([m.norms().sum() * prod(m.block) ** 0.5 for m in self._matrices]).sum()

    @property
    def sparsities(self) -> dict[str, float]:
        """The fraction of zeros of each weight, by name."""
        return {
            matrix.name: float((matrix.weight.detach() == 0).float().mean())
            for matrix in self._matrices
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on as if nothing had happened."""
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return {"steps": self.steps, "masks": masks, "slopes": dict(self._slopes)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was gone is zero at once.

        Raises:
            InvalidRequestError: the state is of other weights or other blocks.

        """
        expected_shapes, state_shapes = (
            {name: tuple(mask.shape) for name, mask in masks.items()}
            for masks in (self.masks, state["masks"])
        )
        if expected_shapes != state_shapes:
            raise InvalidRequestError(
                f"the state is of other weights or blocks: it has {state_shapes}, and this schedule "
                f"{expected_shapes}"
            )
        self.steps, self._slopes = int(state["steps"]), dict(state["slopes"])
        self.masks = {
            name: mask.to(self.masks[name].device) for name, mask in state["masks"].items()
        }
        for matrix in self._matrices:
            matrix.weight.mul_(matrix.spread(self.masks[matrix.name]))


def _matrices(model: nn.Module, block: tuple[int, int]) -> Iterator[Matrix]:
    """Yield the weights of recurrent and linear layers, those with several names once."""
    names = {id(parameter): name for name, parameter in parameter_names(model).items()}
    yielded_ids: set[int] = set()
    for module in model.modules():
        gates = next((n for layer_type, n in _GATES.items() if isinstance(module, layer_type)), 0)
        kind: Kind = "linear" if isinstance(module, nn.Linear) else "recurrent"
        for leaf, weight in module.named_parameters(recurse=False):
            if gates and leaf.startswith("weight") and id(weight) not in yielded_ids:
                yielded_ids.add(id(weight))
                projects = leaf.startswith("weight_hr")  # from the cell to what it passes on
                yield Matrix(names[id(weight)], weight, kind, 1 if projects else gates, block)


def _quantiles(
    matrices: Sequence[Matrix], reference: Mapping[str, nn.Parameter], by_layer: bool
) -> dict[str, float]:
    """Return where the threshold of each weight ends.

    Raises:
        InvalidRequestError: the reference lacks a weight, or most of its weights are zero.

    """
    missing = [matrix.name for matrix in matrices if matrix.name not in reference]
    if missing:
        raise InvalidRequestError(
            f"the reference has no {', '.join(missing)}, whose size the threshold would follow; it must be "
            "a model of the same names"
        )
    pools: dict[str, list[Tensor]] = {}
    for matrix in matrices:
        values = reference[matrix.name].detach().abs().flatten().double()
        pools.setdefault(matrix.name if by_layer else matrix.kind, []).append(values)
    quantile_of_pool = {}
    for pool, parts in pools.items():
        sorted_values = torch.cat(parts).sort().values
        quantile_of_pool[pool] = float(sorted_values[int(QUANTILE * (len(sorted_values) - 1))])
        if quantile_of_pool[pool] == 0:
            raise InvalidRequestError(
                f"nine tenths of the {pool} weights of the reference are zero, so they say no threshold; "
                "pass reference=, a dense model"
            )
    return {
        matrix.name: quantile_of_pool[matrix.name if by_layer else matrix.kind]
        for matrix in matrices
    }
