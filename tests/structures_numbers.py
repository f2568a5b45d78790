"""Small structures of complex numbers, transforms, masks and slots addressed by number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structures_registry import (
    between,
    both,
    conv,
    head,
    hidden,
    image,
    normal,
    out,
    structure,
    tokens,
    vector,
    wide,
)


@structure(image)
class SpectralConvolution(nn.Module):
    """A Fourier neural operator's layer: complex weights on the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = wide(), out(20)
        self.weight = nn.Parameter(torch.randn(24, 20, 4, 3, dtype=torch.cfloat) / 24)

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft2(self.first(x))
        made = frequencies.new_zeros(x.shape[0], 20, 9, 5)
        made[:, :, :4, :3] = torch.einsum("bixy,ioxy->boxy", frequencies[..., :4, :3], self.weight)
        return self.last(torch.fft.irfft2(made, s=(9, 8)))


@structure(normal(7, 20))
class ComplexRotary(nn.Module):
    """Rotary positions as products of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(20, 24) for _ in range(3))
        self.last = nn.Linear(24, 6)
        angles = torch.outer(torch.arange(7.0), 10 ** -torch.linspace(0, 1, 4))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles))

    def rotated(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.rotations).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (3, 8)) for layer in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(self.rotated(query), self.rotated(key), value)
        return self.last(mixed.transpose(1, 2).flatten(2))


between(
    "phase",
    vector,
    hidden,
    lambda x: torch.complex(x, 0.5 * x.roll(1, 0)).conj().abs(),
    head,
)


@structure(vector)
class RadialBasis(nn.Module):
    """Distances to centres, and a bilinear form of what was near."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.centres = hidden(), nn.Parameter(torch.randn(16, 20))
        self.form, self.last = nn.Bilinear(16, 20, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        near = torch.exp(-0.1 * torch.cdist(x, self.centres))
        return self.last(self.form(near, x).relu())


@structure(normal(3, 8, 8))
class Unpooling(nn.Module):
    """SegNet's way up: the places that the pooling took from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = wide(), conv(24, 24), out()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return self.last(F.max_unpool2d(self.middle(pooled) * pooled, places, 2))


@structure(both(vector, lambda: (torch.tensor([[0, 1], [1, 0], [1, 1]]),)))
class MessagePassing(nn.Module):
    """A graph network: nodes add up what comes along their edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.last = hidden(), nn.Linear(20, 20), head()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.first(x)
        sources, targets = edges.unbind(1)
        return self.last(x.index_add(0, targets, self.message(x[sources]).relu()))


@structure(both(tokens(7, 31), normal(3, 10)))
class ImageInText(nn.Module):
    """A multimodal model: features of an image stand where the text has a placeholder (token 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.project = nn.Embedding(31, 20), nn.Linear(10, 20)
        self.middle, self.last = nn.Linear(20, 16), nn.Linear(16, 6)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, 2:5] = 0
        x = self.embedding(ids)
        there = (ids == 0).unsqueeze(-1).expand_as(x)
        x = x.masked_scatter(there, self.project(features))
        return self.last(self.middle(x).relu())


@structure(normal(7, 20))
class KeptTokens(nn.Module):
    """Tokens of a large enough norm pass; how many there are depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(20, 24), nn.Linear(24, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)[x.norm(dim=-1) > 4.4]
        return self.last(self.middle(kept).relu()).sum(0)
