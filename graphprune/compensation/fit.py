"""Least squares in closed form: the change of a layer that brings its output nearest to what is wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Shares of the features' own squares that are added to them: from next to nothing, where there are
# more samples than features, to a choice that hardly moves the weights.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Sums(NamedTuple):
    """Sums over samples, with features f and residuals r: of f f', of r f' and of r squared.

    Shapes: `[G, F, F]`, `[G, O, F]` and `[G, O]`, for G layers side by side (one but for grouped
    convolutions), F features and O outputs; in float64.
    """

    squares: Tensor
    products: Tensor
    residuals: Tensor


class NormalEquations:
    """Sums over samples from which a layer `W f` can be changed; memory does not grow with samples.

    The change `D` minimises the squared residual `r - D f` and a ridge `D diag(sum f f') D'`. Samples
    come in portions, which are summed in two halves by turns, so that the ridge can be chosen by how
    well a fit to one half serves the other.
    """

    def __init__(self) -> None:
        self.squares: list[Tensor] = []
        self.products: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.portions = 0

    def add(self, squares: Tensor | None, products: Tensor, residuals: Tensor) -> None:
        """Take in the sums over a portion; those of the features are None where they are known."""
        half = self.portions % 2
        if squares is not None:
            _add(self.squares, half, squares)
        _add(self.products, half, products)
        _add(self.residuals, half, residuals)
        self.portions += 1

    def forget_residuals(self) -> None:
        """Keep what is known of the features alone: the portions come again with other residuals."""
        self.products, self.residuals, self.portions = [], [], 0

    @property
    def halves(self) -> list[Sums]:
        """The sums over each half of the samples; one where there was but one portion."""
        return list(map(Sums, self.squares, self.products, self.residuals))

    @property
    def total(self) -> Sums:
        """The sums over all samples."""
        halves = self.halves
        return (
            halves[0] if len(halves) == 1 else Sums(*(a + b for a, b in zip(*halves, strict=True)))
        )

    def fit(self, free: slice = slice(None)) -> Tensor:
        """Return the change of the weights, `[G, O, F]`, float64; zero where none would do good.

        Args:
            free: which features' weights may change.

        """
        halves = self.halves
        pairs = [(halves[0], halves[-1]), (halves[-1], halves[0])]
        errors = {
            ridge: sum(_error(other, _solved(one, free, ridge)) for one, other in pairs)
            for ridge in RIDGES
        }
        best = min(errors, key=errors.__getitem__)
        if errors[best] < sum(float(other.residuals.sum()) for _, other in pairs):
            return _solved(self.total, free, best)
        return torch.zeros_like(self.products[0])

    def moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of `W f` by output, `[G * O]`, the last feature being always one."""
        squares = self.total.squares
        count = squares[..., -1:, -1]
        mean = (weights @ squares[..., -1:]).squeeze(-1) / count
        second = ((weights @ squares) * weights).sum(-1) / count
        return mean.flatten(), (second - mean.square()).clamp_min(0).flatten()


def _add(sums: list[Tensor], half: int, more: Tensor) -> None:
    if half == len(sums):
        sums.append(more)
    else:
        sums[half] += more


def _error(sums: Sums, change: Tensor) -> float:
    """Return the squared residual that a change leaves."""
    explained = (change @ sums.squares - 2 * sums.products) * change
    return float(sums.residuals.sum() + explained.sum())


def _solved(sums: Sums, free: slice, ridge: float) -> Tensor:
    """Return the change of the free features' weights that minimises squared residual and ridge."""
    squares = sums.squares[..., free, free]
    own = squares.diagonal(dim1=-2, dim2=-1)
    least = own.mean(-1, keepdim=True) * 1e-6 + torch.finfo(own.dtype).tiny
    factor = torch.linalg.cholesky(squares + torch.diag_embed(ridge * own + least))
    change = torch.zeros_like(sums.products)
    change[..., free] = torch.cholesky_solve(sums.products[..., free].mT, factor).mT
    return change
