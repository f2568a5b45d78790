"""A first guess for a layer: every channel of the original's input as a mixture of those that stayed.

A layer with a window, or one that reads maps flattened to a vector, has many weights for each channel
that it reads, and a few samples say little about them all. How channels follow from each other takes
far fewer numbers: `x = A y`, with `x` the channels of the original and `y` those of the slim model, the
same at every position. The original's weights applied to `A y` are weights for `y`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from graphprune.calibration.batches import Share
from graphprune.compensation.least_squares import NormalEquations
from graphprune.graph_utils.linear_layers import ConvolutionLayer, Layer
from graphprune.layout import Axis, Layout, Product, resolve, size_of
from graphprune.masks import Mask, mask_of, touches


@dataclass(frozen=True)
class Mixing:
    """How the channels of a layer's input lie in it, and which of them stayed.

    Attributes:
        before: positions within a sample that vary slower than the channel.
        kept: which of the original's channels the slim model has.
        after: positions, or entries of a window, that vary faster.
        is_map: whether the channels are dimension 1 of the input, the positions behind it.

    """

    before: int
    kept: Tensor
    after: int
    is_map: bool

    @classmethod
    def of(
        cls, layer: Layer, weight: Tensor, layout: Layout, masks: Mapping[Axis, Mask]
    ) -> Mixing | None:
        """Return the mixing for an original layer, or None where it would save nothing.

        Args:
            layer: the layer of the original.
            weight: its weight.
            layout: what the dimension of its input that it sums over is made of.
            masks: which slots stay.

        """
        if layer.groups != 1:
            return None
        if isinstance(layer, ConvolutionLayer):
            kept, window = torch.from_numpy(mask_of(layout, masks)), weight.shape[2:].numel()
            return cls(1, kept, window, True) if window > 1 and not kept.all() else None
        layout = resolve(layout)
        if not isinstance(layout, Product):
            return None
        # Of (before channels after), say a map of [channels, height, width] that was flattened.
        cut_positions = [
            position for position, factor in enumerate(layout.factors) if touches(factor, masks)
        ]
        if len(cut_positions) != 1:
            return None
        before, after = layout.factors[: cut_positions[0]], layout.factors[cut_positions[0] + 1 :]
        kept = torch.from_numpy(mask_of(layout.factors[cut_positions[0]], masks))
        return cls(size_of(Product(before)), kept, size_of(Product(after)), False)

    def channels(self, data: Tensor) -> Tensor:
        """Return an input, of either model, as `[positions, channels]`."""
        if self.is_map:
            # [batch, channels, *space] -> [batch, *space, channels] -> [positions, channels]
            return data.movedim(1, -1).flatten(0, -2)
        channels = data.shape[-1] // (self.before * self.after)
        # [..., before * channels * after] -> [samples, before, after, channels]
        return data.reshape(-1, self.before, channels, self.after).movedim(2, -1).flatten(0, -2)

    def fit_mixture(
        self, batches: Share, original_inputs: Sequence[Tensor], slim_inputs: Sequence[Tensor]
    ) -> Tensor:
        """Return how the original's channels follow from those of the slim model, and a constant one.

        Shape: `[original channels, channels + 1]`, float64. Where a fit would do no good, a channel
        that stayed is itself, and one that went is zero.
        """
        slots = self.kept.nonzero().flatten()
        # [original channels, kept channels + 1]: the identity for those that stayed, else zero.
        guess = torch.zeros(len(self.kept), len(slots) + 1, dtype=torch.float64)
        guess[slots, torch.arange(len(slots))] = 1.0
        equations = NormalEquations()
        for number, original_data, slim_data in zip(
            batches.places, original_inputs, slim_inputs, strict=True
        ):
            # Two pieces at least, one after the other in number, so that each half gets some.
            for piece, rows in enumerate(Layer.pieces(original_data, original_data[:, :1])):
                # [positions, kept channels + 1]
                features = F.pad(self.channels(slim_data[rows]), (0, 1), value=1.0).double()
                # [positions, original channels]
                missing = (
                    self.channels(original_data[rows]).double() - features @ guess.to(features).mT
                )
                residuals = missing.square().sum(0)  # [original channels]
                equations.add(
                    number + piece,
                    partial(features.unsqueeze, 0),  # [1, positions, kept channels + 1]
                    (missing.mT @ features)[None],  # [1, original channels, kept channels + 1]
                    residuals[None],
                )
        equations.gather(batches)
        return guess + equations.fit()[0].cpu()

    def mix_weights(self, matrix: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """Return the original's weights for the channels that stayed, and the bias that goes along.

        Args:
            matrix: `[outputs, original features]`, float64.
            mixture: from `fit_mixture`.

        """
        # [outputs, before, original channels, after]
        by_channel = matrix.unflatten(1, (self.before, len(self.kept), self.after))
        mixture = mixture.to(matrix)
        # With x = A y + a, the mixture being [A a], W x is (W A) y + W a: weights
        # [outputs, before, kept channels, after], and a bias [outputs], summed over all positions.
        weights = torch.einsum("obca,ck->obka", by_channel, mixture[:, :-1])
        return weights.flatten(1), torch.einsum("obca,c->o", by_channel, mixture[:, -1])
