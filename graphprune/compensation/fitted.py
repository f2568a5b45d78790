"""One layer on its way from the weights that it had to those that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphprune.compensation.fit import NormalEquations
from graphprune.compensation.layers import held_by
from graphprune.compensation.norm import BatchNorm
from graphprune.compensation.sites import Site

# Features of convolutions are written out at most this much at a time.
_FEATURE_BYTES = 256 << 20

# An error smaller than this is none: the layer and what it reads are as they were.
_ROUNDING = 1e-10


class FittedLayer:
    """A layer of a graph, the batch norm that may follow it, and the sums that its fit needs.

    A batch norm is seen through: with `scale = weight / sqrt(variance + eps)` its output is
    `scale * (layer - mean) + bias`, so a target for its output is one for the layer's. It takes the
    bias of a layer that has none, and its statistics become those of the new layer, so that it says
    the same in training as in evaluation.
    """

    def __init__(self, site: Site, graph_module: fx.GraphModule) -> None:
        self.site = site
        self.layer = site.layer
        self.weight = held_by(graph_module, self.layer.weight)
        self.bias = held_by(graph_module, self.layer.bias) if self.layer.bias else None
        self.norm = BatchNorm(graph_module, site.norm) if site.norm else None
        self.arguments: dict[str, Any] = {}
        self.equations = NormalEquations()

    def add(self, values: Mapping[fx.Node, Any], target: Tensor) -> None:
        """Take in a batch: the values of the slim graph's nodes, and what the site should end in."""
        if self.site.rest is not None:
            target = target - values[self.site.rest]
        if self.norm is not None:
            target = self.norm.inverse(target)
        data = values[self.layer.data]
        self.arguments = self.layer.arguments(values)
        for rows in self._pieces(data):
            features = self.layer.features(data[rows], self.weight, self.arguments)
            if self.has_bias:
                features = F.pad(features, (0, 1), value=1.0)
            self.equations.add(features, self.layer.samples(target[rows], self.arguments))

    @property
    def has_bias(self) -> bool:
        """Whether there is a place for a bias: the layer's own, or that of the batch norm."""
        return self.bias is not None or self.norm is not None

    def _pieces(self, data: Tensor) -> Iterator[slice]:
        """Yield slices of the data's first dimension whose features are not too large."""
        one = data[:1].numel() * self.weight[0, 0].numel() * data.element_size()
        step = max(1, _FEATURE_BYTES // max(one, 1))
        yield from (slice(start, start + step) for start in range(0, len(data), step))

    def solve(self, *, bias_alone: bool) -> tuple[float, float]:
        """Give the layer the weights that fit, or its bias alone; return its errors before and after.

        Units: squared error over the square of the target, summed over all outputs.
        """
        start = self._matrix()
        free = slice(start.shape[-1] - 1, None) if bias_alone else slice(None)
        as_cut = self.equations.error(start)
        if as_cut < _ROUNDING or (bias_alone and not self.has_bias):
            return as_cut, as_cut
        found = self.equations.fit(start, free)
        errors = as_cut, self.equations.error(found)
        if found is not start:
            self._take(found)
        return errors

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
