"""Numbers that modules hold: sizes that their code goes by follow, and descriptions stay true."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp


class Heads(nn.Module):
    """Attention whose sizes stand in attributes; `width` is both the model's and the heads' together."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads, self.features = 16, 4, 4
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.width, dim=-1)
        query, key, value = (
            part.view(*x.shape[:2], self.heads, self.features).transpose(1, 2) for part in parts
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.last(x + self.out(mixed))


@pytest.mark.parametrize("verify", [True, False])
def test_sizes_in_attributes_are_followed_and_the_class_stays(verify: bool) -> None:
    model = Heads()
    slimmer = gp.slim(model, 0.5, torch.randn(2, 7, 16), verify=verify)
    assert isinstance(slimmer, Heads)
    assert (slimmer.width, slimmer.heads, slimmer.features) == (8, 2, 4)
    assert (model.width, model.heads, model.features) == (16, 4, 4)


class Divides(nn.Module):
    """A size that no operator is given, only what the code makes of it; `length` is equal by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads, self.length = 24, 4, 24
        self.first, self.last = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.length
        parts = self.first(x).view(-1, self.length, self.heads, self.width // self.heads)
        return self.last(parts.softmax(1).flatten(2))


def test_a_size_that_code_divides_is_followed_and_an_accidental_equal_is_left() -> None:
    slimmer = gp.slim(Divides(), 0.5, torch.randn(2, 24, 6))
    assert isinstance(slimmer, Divides)
    assert (slimmer.width, slimmer.heads, slimmer.length) == (12, 2, 24)


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_attention_of_torch_tells_true_sizes_where_its_heads_still_fill_it() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 32), layer, nn.Linear(32, 5))
    slimmer = gp.slim(model, 0.5, torch.randn(2, 7, 6), renormalised=True, form="module")
    attention = slimmer[1].self_attn
    assert (attention.embed_dim, attention.kdim, attention.vdim) == (16, 16, 16)
    assert (attention.num_heads, attention.head_dim) == (2, 8)
    assert slimmer.train()(torch.randn(3, 7, 6)).shape == (3, 7, 5)
