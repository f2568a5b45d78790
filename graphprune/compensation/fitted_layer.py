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
from graphprune.graph_utils.linear_layers import tensor_read_by
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
        self.weight = tensor_read_by(graph_module, self.layer.weight)
        self.bias = tensor_read_by(graph_module, self.layer.bias) if self.layer.bias else None
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
        squared_error = squared_target = 0.0
        for number, batch, run, target in zip(batches.places, batches, runs, targets, strict=True):
            self.arguments = self.layer.arguments(run.env)
            missing = self._find_missing(run.env, target)
            refuse_unless_finite(batch, run.env[self.layer.data], self._where)
            refuse_unless_finite(batch, missing, self._where)
            # The error is measured where the site ends, the fit made before its norm.
            squared_error += float(missing.double().square().sum())
            squared_target += float(target[target.isfinite()].double().square().sum())
            if self.norm is not None:
                missing = self.norm.unscale(missing)
            self._add(batch, number, run.env[self.layer.data], missing)
        self.equations.gather(batches)
        squared_error, squared_target = map(float, batches.total((squared_error, squared_target)))
        self.error = squared_error / squared_target if squared_target else 0.0

    def _find_missing(self, values: Mapping[fx.Node, Any], target: Tensor) -> Tensor:
        """Return what the end of the site lacks.

        Where what follows takes one value for another (a ReLU, all negative ones), a value on the
        target's side lacks nothing.
        """
        data = values[self.layer.data]
        # [batch, channels, *space] or [..., channels], as are target and result
        output = self.layer.value(data, self.weight, self.bias, self.arguments)
        if self.norm is not None:
            output = self.norm(output)
        if self.site.rest is not None:
            output = output + values[self.site.rest]
        # Before a ReLU, an output of -3 lacks nothing of a target of -1, and one of 2 lacks -2; but where
        # the target is inside the bounds, the output counts as it is: -3 lacks 5 of 2.
        low, high = self.site.bounds
        clamped = target.clamp(low, high)
        output = torch.where((target > low) & (target < high), output, output.clamp(low, high))
        same_infinity = (clamped == output) & clamped.isinf()  # of a mask that is added
        return (clamped - output).masked_fill(same_infinity, 0.0)

    @property
    def _where(self) -> str:
        return f"where {self.layer.weight.target} is fitted"

    def _add(self, batch: Batch, number: int, data: Tensor, missing: Tensor) -> None:
        for piece, rows in enumerate(self.layer.pieces(data, self.weight)):
            # [G, O, F]; one more column, [G, O, 1], belongs to the feature that is always one.
            products = self.layer.products(data[rows], missing[rows], self.weight, self.arguments)
            # [G, samples, O]
            residuals = self.layer.samples(missing[rows], self.arguments).double()
            if self.has_bias:
                products = torch.cat([products, residuals.sum(1).unsqueeze(-1)], dim=-1)
            refuse_unless_finite(batch, products, self._where)
            features = partial(self._features, data[rows])  # [G, samples, F], if it is asked for
            # Neighbouring numbers are in different halves, and there are two pieces at least.
            self.equations.add(number + piece, features, products, residuals.square().sum(1))

    def _features(self, data: Tensor) -> Tensor:
        # [G, samples, F]
        features = self.layer.features(data, self.weight, self.arguments).double()
        return F.pad(features, (0, 1), value=1.0) if self.has_bias else features

    def replace(self, weights: Tensor, extra: Tensor) -> None:
        """Take other weights, `[groups, outputs, features]`, and add `extra` to the bias, if any."""
        matrix = self._matrix()
        if self.has_bias:
            matrix[..., -1] += extra.reshape(matrix.shape[:-1])  # [G * O] as [G, O]
            matrix[..., :-1] = weights
        else:
            matrix = weights
        self._take(matrix)

    def put_back(self, values: Sequence[Tensor]) -> None:
        """Give `tensors` such values."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    @property
    def tensors(self) -> list[Tensor]:
        """All that a fit changes."""
        layer_tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return layer_tensors if self.norm is None else [*layer_tensors, *self.norm.tensors]

    def fit(self, *, bias_alone: bool) -> None:
        """Give the layer the weights that fit, or its bias alone."""
        if bias_alone and not self.has_bias:
            return
        count = self.equations.products[0].shape[-1]
        change = self.equations.fit(slice(count - 1, None) if bias_alone else slice(None))
        if bool(change.any()):
            self._take(self._matrix() + change)

    def _matrix(self) -> Tensor:
        matrix = self.layer.matrix(self.weight, self.arguments).double()  # [G, O, F]
        if not self.has_bias:
            return matrix
        # A layer that leaves the bias to its norm has none of its own: zeros, [G, O].
        bias = matrix.new_zeros(matrix.shape[:2]) if self.bias is None else self.bias
        return torch.cat([matrix, bias.double().reshape(*matrix.shape[:2], 1)], dim=-1)

    def _take(self, augmented: Tensor) -> None:
        """Put a fitted matrix, and the bias in its last column, where they belong."""
        matrix = augmented[..., :-1] if self.has_bias else augmented
        self.weight.copy_(self.layer.weight_like(self.weight, matrix, self.arguments))
        bias = augmented[..., -1].flatten()  # [G * O], the layer's output channels
        if self.bias is not None:
            self.bias.copy_(bias)
        if self.norm is not None:
            # Of W f and the bias, [G * O]; a layer without one leaves that to its norm, which sees W f.
            mean, variance = self.equations.moments(augmented)
            extra = torch.zeros_like(bias) if self.bias is not None else bias
            self.norm.adopt_statistics(mean - extra, variance, extra)
