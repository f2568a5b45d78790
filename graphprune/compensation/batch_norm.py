"""A batch norm in evaluation, seen as a scale and a shift for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphprune.graph_utils.linear_layers import tensor_read_by
from graphprune.rules import arguments_of


class BatchNorm:
    """What a batch norm of a graph does to each channel, and the tensors that say so."""

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        arguments = arguments_of(node)
        self.eps: float = arguments["eps"]
        self.weight, self.bias, self.mean, self.variance = (
            tensor_read_by(graph_module, arguments[name])
            for name in ("weight", "bias", "running_mean", "running_var")
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Weight, bias and statistics."""
        return [self.weight, self.bias, self.mean, self.variance]

    @property
    def scale(self) -> Tensor:
        """What each channel is multiplied by, in float64."""
        return self.weight.double() / (self.variance.double() + self.eps).sqrt()  # [channels]

    def __call__(self, data: Tensor) -> Tensor:
        """Return the output for an input `[batch, channel, ...]`."""
        shape = (1, -1, *[1] * (data.dim() - 2))
        # [batch, channel, ...] - [1, channel, 1, ...]
        centred = data - self.mean.view(shape)
        return (centred * self.scale.view(shape) + self.bias.view(shape)).to(data.dtype)

    def unscale(self, difference: Tensor) -> Tensor:
        """Return the difference of inputs that makes such a difference of outputs.

        A channel whose scale is next to zero gives the same whatever comes in: no difference does it.
        """
        scale = self.scale  # [channels]
        inverse = torch.where(scale.abs() < 1e-6, 0.0, 1 / scale)
        shape = (1, -1, *[1] * (difference.dim() - 2))
        # [batch, channel, ...] * [1, channel, 1, ...]
        return difference * inverse.view(shape).to(difference.dtype)

    def adopt_statistics(self, mean: Tensor, variance: Tensor, extra: Tensor) -> None:
        """Give the statistics of a new input, and do to it plus `extra` what was done to the old one.

        Args:
            mean: of the new input, a value a channel.
            variance: of the new input.
            extra: a bias that the new input lacks.

        """
        # x + extra is what the old input was, so the output stays
        # scale (x + extra - old mean) + old bias = scale (x - mean) + new bias, all [channels];
        # scale and old mean are read before they change.
        scale = self.scale
        self.bias.copy_(self.bias + scale * (mean + extra - self.mean))
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.weight.copy_(scale * (variance + self.eps).sqrt())
