"""One layer on its way from the weights that it had to those that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphprune.calibration.batches import Batch, Share, refuse_unless_finite
from graphprune.compensation.batch_norm import BatchNorm
from graphprune.compensation.least_squares import NormalEquations
from graphprune.compensation.sites import Site
from graphprune.graph_utils.linear_layers import held_by
from graphprune.graph_utils.stepwise import Run


class FittedLayer:
    """A layer of a graph, the batch norm that may follow it, and the sums that its fit needs.

    A batch norm is seen through: what is missing at its output is missing at the layer's, over the
    norm's scale. It takes the bias of a layer that has none, and its statistics become those of the
    new layer, so that it says the same in training as in evaluation.

    Attributes:
        error: squared distance from what is aimed at, over the square of that, at the last `aim`.

    """

    def __init__(self, site: Site, graph_module: fx.GraphModule) -> None:
        self.site = site
        self.layer = site.layer
        self.weight = held_by(graph_module, self.layer.weight)
        self.bias = held_by(graph_module, self.layer.bias) if self.layer.bias else None
        self.norm = BatchNorm(graph_module, site.norm) if site.norm else None
        self.arguments: dict[str, Any] = {}
        self.equations = NormalEquations()
        self.error = 0.0

    @property
    def has_bias(self) -> bool:
        """Whether there is a place for a bias: the layer's own, or that of the batch norm."""
        return self.bias is not None or self.norm is not None

    def aim(self, batches: Share, runs: Sequence[Run], targets: Sequence[Tensor]) -> None:
        """Take in what the site should end in, for runs of the slim graph that stand before it."""
        self.equations.forget_residuals()
        missed = wanted = 0.0
        for place, batch, run, target in zip(batches.places, batches, runs, targets, strict=True):
            self.arguments = self.layer.arguments(run.env)
            missing = self._missing(run.env, target)
            refuse_unless_finite(batch, run.env[self.layer.data], self._where)
            refuse_unless_finite(batch, missing, self._where)
            missed += float(missing.double().square().sum())
            wanted += float(target[target.isfinite()].double().square().sum())
            if self.norm is not None:
                missing = self.norm.unscaled(missing)
            self._add(batch, place, run.env[self.layer.data], missing)
        self.equations.gather(batches)
        missed, wanted = map(float, batches.total((missed, wanted)))
        self.error = missed / wanted if wanted else 0.0

    def _missing(self, values: Mapping[fx.Node, Any], target: Tensor) -> Tensor:
        """Return what the end of the site lacks.

        Where what follows takes one value for another (a ReLU, all negative ones), a value on the
        target's side lacks nothing.
        """
        data = values[self.layer.data]
        given = self.layer.value(data, self.weight, self.bias, self.arguments)
        if self.norm is not None:
            given = self.norm(given)
        if self.site.rest is not None:
            given = given + values[self.site.rest]
        low, high = self.site.bounds
        wanted = target.clamp(low, high)
        given = torch.where((target > low) & (target < high), given, given.clamp(low, high))
        same_infinity = (wanted == given) & wanted.isinf()  # of a mask that is added
        return (wanted - given).masked_fill(same_infinity, 0.0)

    @property
    def _where(self) -> str:
        return f"where {self.layer.weight.target} is fitted"

    def _add(self, batch: Batch, place: int, data: Tensor, missing: Tensor) -> None:
        for piece, rows in enumerate(self.layer.pieces(data, self.weight)):
            products = self.layer.products(data[rows], missing[rows], self.weight, self.arguments)
            residuals = self.layer.samples(missing[rows], self.arguments).double()
            if self.has_bias:
                products = torch.cat([products, residuals.sum(1).unsqueeze(-1)], dim=-1)
            refuse_unless_finite(batch, products, self._where)
            features = partial(self._features, data[rows])
            self.equations.add(place + piece, features, products, residuals.square().sum(1))

    def _features(self, data: Tensor) -> Tensor:
        features = self.layer.features(data, self.weight, self.arguments).double()
        return F.pad(features, (0, 1), value=1.0) if self.has_bias else features

    def replace(self, weights: Tensor, extra: Tensor) -> None:
        """Take other weights, `[groups, outputs, features]`, and add `extra` to the bias, if any."""
        found = self._matrix()
        if self.has_bias:
            found[..., -1] += extra.reshape(found.shape[:-1])
            found[..., :-1] = weights
        else:
            found = weights
        self._take(found)

    def put_back(self, values: Sequence[Tensor]) -> None:
        """Give `tensors` such values."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    @property
    def tensors(self) -> list[Tensor]:
        """All that a fit changes."""
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own if self.norm is None else [*own, *self.norm.tensors]

    def fit(self, *, bias_alone: bool) -> None:
        """Give the layer the weights that fit, or its bias alone."""
        if bias_alone and not self.has_bias:
            return
        count = self.equations.products[0].shape[-1]
        change = self.equations.fit(slice(count - 1, None) if bias_alone else slice(None))
        if bool(change.any()):
            self._take(self._matrix() + change)

    def _matrix(self) -> Tensor:
        matrix = self.layer.matrix(self.weight, self.arguments).double()
        if not self.has_bias:
            return matrix
        bias = matrix.new_zeros(matrix.shape[:2]) if self.bias is None else self.bias
        return torch.cat([matrix, bias.double().reshape(*matrix.shape[:2], 1)], dim=-1)

    def _take(self, found: Tensor) -> None:
        """Put a fitted matrix, and the bias in its last column, where they belong."""
        matrix = found[..., :-1] if self.has_bias else found
        self.weight.copy_(self.layer.weight_like(self.weight, matrix, self.arguments))
        bias = found[..., -1].flatten()
        if self.bias is not None:
            self.bias.copy_(bias)
        if self.norm is not None:
            mean, variance = self.equations.moments(found)
            extra = torch.zeros_like(bias) if self.bias is not None else bias
            self.norm.become(mean - extra, variance, extra)
