"""Least squares in closed form: the change of a layer that brings its output nearest to what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from graphprune.calibration.batches import Share
from graphprune.distributed.process_group import Ranks

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
    come in portions, which are summed in two halves, so that the ridge can be chosen by how well a fit
    to one half serves the other. Once all portions were added, `gather` adds those of other processes.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.squares: Tensor | None = None
        self.products = self.residuals = torch.empty(0)
        self.portions = torch.zeros(2)
        self.has_squares = False

    def add(
        self, number: int, features: Callable[[], Tensor], products: Tensor, residuals: Tensor
    ) -> None:
        """Take in a portion.

        Args:
            number: even ones are one half of the samples, odd ones the other.
            features: gives them, `[G, samples, F]` in float64; asked the first time that it is added.
            products: its sum of r f'.
            residuals: its sum of r squared.

        """
        half = number % 2
        if not self.portions.any():
            self.products = products.new_zeros(2, *products.shape)
            self.residuals = residuals.new_zeros(2, *residuals.shape)
        if not self.has_squares:
            feature_matrix = features()  # [G, samples, F]
            if self.squares is None:
                self.squares = feature_matrix.new_zeros(
                    2, len(feature_matrix), feature_matrix.shape[-1], feature_matrix.shape[-1]
                )
            # [G, F, samples] @ [G, samples, F] -> [G, F, F]
            self.squares[half] += feature_matrix.mT @ feature_matrix
        self.products[half] += products  # [G, O, F]
        self.residuals[half] += residuals  # [G, O]
        self.portions[half] += 1

    def forget_residuals(self) -> None:
        """Keep what is known of the features alone: the portions come again with other residuals."""
        # What a layer reads does not change with its own weights, so the squares hold.
        self.has_squares = self.squares is not None
        self.portions = torch.zeros(2)

    def gather(self, batches: Share) -> None:
        """Add what the other processes were given."""
        self.ranks = batches.ranks
        local_sums = [self.products, self.residuals, self.portions]
        if self.has_squares:  # the squares are sums over all processes already
            self.products, self.residuals, self.portions = batches.total(local_sums)
        else:
            totals = batches.total([*local_sums, self.squares])
            self.products, self.residuals, self.portions, self.squares = totals

    @property
    def halves(self) -> list[Sums]:
        """The sums over each half of the samples; one where there is but one portion."""
        assert self.squares is not None
        sums_of_halves = zip(self.squares, self.products, self.residuals, strict=True)
        return [
            Sums(*sums) for sums, count in zip(sums_of_halves, self.portions, strict=True) if count
        ]

    @property
    def total(self) -> Sums:
        """The sums over all samples."""
        assert self.squares is not None
        return Sums(self.squares.sum(0), self.products.sum(0), self.residuals.sum(0))

    def fit(self, free: slice = slice(None)) -> Tensor:
        """Return the change of the weights, `[G, O, F]`, float64; zero where none would do good.

        Args:
            free: which features' weights may change.

        """
        halves = self.halves
        # Fitted to one half and tried on the other; with one portion, on that itself.
        pairs = [(halves[0], halves[-1]), (halves[-1], halves[0])]
        errors = torch.zeros(len(RIDGES), dtype=torch.float64)
        # Each process fills in some errors and leaves zeros for the others: the sum has them all.
        local_numbers = range(self.ranks.rank, len(RIDGES), self.ranks.size)
        for number in local_numbers:
            ridge = RIDGES[number]
            errors[number] = sum(
                _error(other_half, _solve(fitted_half, free, ridge))
                for fitted_half, other_half in pairs
            )
        (errors,) = self.ranks.total([errors])
        best_number = int(errors.argmin())
        # The residuals alone are the error of no change at all.
        if float(errors[best_number]) < sum(
            float(other_half.residuals.sum()) for _, other_half in pairs
        ):
            return _solve(self.total, free, RIDGES[best_number])
        return torch.zeros_like(self.products[0])

    def moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of `W f` by output, `[G * O]`, the last feature being always one."""
        squares = self.total.squares  # [G, F, F]
        count = squares[..., -1:, -1]  # [G, 1], the sum over samples of one squared
        # [G, O, F] @ [G, F, 1] -> [G, O, 1], over [G, 1].
        mean = (weights @ squares[..., -1:]).squeeze(-1) / count
        # The diagonal of W (sum f f') W', [G, O].
        second_moment = ((weights @ squares) * weights).sum(-1) / count
        return mean.flatten(), (second_moment - mean.square()).clamp_min(0).flatten()


def _error(sums: Sums, change: Tensor) -> float:
    """Return the squared residual that a change leaves."""
    # By output, |r - D f|^2 = |r|^2 + D (sum f f') D' - 2 (sum r f') D'; all terms are [G, O, F].
    explained = (change @ sums.squares - 2 * sums.products) * change
    return float(sums.residuals.sum() + explained.sum())


def _solve(sums: Sums, free: slice, ridge: float) -> Tensor:
    """Return the change of the free features' weights that minimises squared residual and ridge."""
    squares = sums.squares[..., free, free]  # [G, F, F]
    diagonal = squares.diagonal(dim1=-2, dim2=-1)  # [G, F], of the free features
    # Features that are zero on all samples would leave the matrix singular.
    floor = diagonal.mean(-1, keepdim=True) * 1e-6 + torch.finfo(diagonal.dtype).tiny
    factor = torch.linalg.cholesky(squares + torch.diag_embed(ridge * diagonal + floor))
    change = torch.zeros_like(sums.products)  # [G, O, F]
    # D solves D (sum f f' + ridge) = sum r f', transposed: [G, F, F] and [G, F, O] give [G, F, O].
    change[..., free] = torch.cholesky_solve(sums.products[..., free].mT, factor).mT
    return change
