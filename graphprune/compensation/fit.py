"""Least squares in closed form: the weights that bring a layer's output nearest to what is wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Shares of the features' own squares that are added to them: from next to nothing, where there are
# more samples than features, to a choice that hardly moves the weights.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Sums(NamedTuple):
    """Sums over samples: of f f' `[G, F, F]`, of t f' `[G, O, F]` and of t squared `[G, O]`."""

    squares: Tensor
    products: Tensor
    targets: Tensor


class NormalEquations:
    """Sums over samples from which a linear layer can be fitted; memory does not grow with samples.

    With features `f` and targets `t`, a layer `t = W f` is fitted to minimise the squared error and a
    ridge `r * diag(sum f f') ` on the distance from the weights that it had. Two halves of the samples
    are summed apart, so that the ridge can be chosen by how well a fit to one half serves the other.

    Shapes: groups G (layers side by side, one but for grouped convolutions), samples P, features F,
    outputs O. Sums are in float64.
    """

    def __init__(self) -> None:
        self.halves: list[Sums] = []

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in samples: features `[G, P, F]` and targets `[G, P, O]`."""
        middle = features.shape[1] // 2
        for half, part in enumerate((slice(None, middle), slice(middle, None))):
            f, t = features[:, part].double(), targets[:, part].double()
            sums = Sums(f.mT @ f, t.mT @ f, t.square().sum(1))
            if half == len(self.halves):
                self.halves.append(sums)
            else:
                for total, more in zip(self.halves[half], sums, strict=True):
                    total += more

    def fit(self, start: Tensor, free: slice = slice(None)) -> Tensor:
        """Return the weights `[G, O, F]` that fit all samples, in float64.

        Args:
            start: weights to stay near; returned as they are where no fit to one half of the samples
                serves the other half better.
            free: which features' weights may change.

        """
        one, other = self.halves
        errors = {
            ridge: _error(other, _solved(one, start, free, ridge))
            + _error(one, _solved(other, start, free, ridge))
            for ridge in RIDGES
        }
        best = min(errors, key=errors.__getitem__)
        if not errors[best] < _error(one, start) + _error(other, start):
            return start
        return _solved(self.total, start, free, best)

    @property
    def total(self) -> Sums:
        """The sums over all samples."""
        return Sums(*(a + b for a, b in zip(*self.halves, strict=True)))

    def error(self, weights: Tensor) -> float:
        """Return the squared error of these weights over the square of the targets."""
        total = self.total
        return _error(total, weights) / max(float(total.targets.sum()), 1e-300)

    def moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each output, `[G * O]`, the last feature being always one."""
        squares = self.total.squares
        count = squares[..., -1:, -1]
        mean = (weights @ squares[..., -1:]).squeeze(-1) / count
        second = ((weights @ squares) * weights).sum(-1) / count
        return mean.flatten(), (second - mean.square()).clamp_min(0).flatten()


def _error(sums: Sums, weights: Tensor) -> float:
    explained = (weights @ sums.squares - 2 * sums.products) * weights
    return float(sums.targets.sum() + explained.sum())


def _solved(sums: Sums, start: Tensor, free: slice, ridge: float) -> Tensor:
    """Return the weights whose free features minimise the squared error and the ridge."""
    missing = (sums.products - start @ sums.squares)[..., free]
    squares = sums.squares[..., free, free]
    own = squares.diagonal(dim1=-2, dim2=-1)
    least = own.mean(-1, keepdim=True) * 1e-6 + torch.finfo(own.dtype).tiny
    factor = torch.linalg.cholesky(squares + torch.diag_embed(ridge * own + least))
    change = torch.cholesky_solve(missing.mT, factor).mT
    found = start.clone()
    found[..., free] += change
    return found
