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
        cut = [place for place, factor in enumerate(layout.factors) if touches(factor, masks)]
        if len(cut) != 1:
            return None
        before, after = layout.factors[: cut[0]], layout.factors[cut[0] + 1 :]
        kept = torch.from_numpy(mask_of(layout.factors[cut[0]], masks))
        return cls(size_of(Product(before)), kept, size_of(Product(after)), False)

    def channels(self, data: Tensor) -> Tensor:
        """Return an input, of either model, as `[positions, channels]`."""
        if self.is_map:
            return data.movedim(1, -1).flatten(0, -2)
        own = data.shape[-1] // (self.before * self.after)
        return data.reshape(-1, self.before, own, self.after).movedim(2, -1).flatten(0, -2)

    def fitted(self, batches: Share, wanted: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
        """Return how the channels of `wanted` follow from those of `given`, and a constant one.

        Shape: `[original channels, channels + 1]`, float64. Where a fit would do no good, a channel
        that stayed is itself, and one that went is zero.
        """
        slots = self.kept.nonzero().flatten()
        start = torch.zeros(len(self.kept), len(slots) + 1, dtype=torch.float64)
        start[slots, torch.arange(len(slots))] = 1.0
        equations = NormalEquations()
        for place, its, mine in zip(batches.places, wanted, given, strict=True):
            for piece, rows in enumerate(Layer.pieces(its, its[:, :1])):
                features = F.pad(self.channels(mine[rows]), (0, 1), value=1.0).double()
                missing = self.channels(its[rows]).double() - features @ start.to(features).mT
                residuals = missing.square().sum(0)
                equations.add(
                    place + piece,
                    partial(features.unsqueeze, 0),
                    (missing.mT @ features)[None],
                    residuals[None],
                )
        equations.gather(batches)
        return start + equations.fit()[0].cpu()

    def mixed(self, matrix: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """Return the original's weights for the channels that stayed, and the bias that goes along.

        Args:
            matrix: `[outputs, original features]`, float64.
            mixture: from `fitted`.

        """
        by_channel = matrix.unflatten(1, (self.before, len(self.kept), self.after))
        mixture = mixture.to(matrix)
        weights = torch.einsum("obca,ck->obka", by_channel, mixture[:, :-1])
        return weights.flatten(1), torch.einsum("obca,c->o", by_channel, mixture[:, -1])
