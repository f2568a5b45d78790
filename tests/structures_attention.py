"""Small structures with attention or tokens."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structures_registry import both, normal, register, structure, tokens

# 7 steps of 20 features: 4 heads of 5 where nothing else is said
sequence = normal(7, 20)
memory = normal(9, 14, seed=2)
ids = tokens(7, 31)


def split_heads(x: Tensor, heads: int = 4) -> Tensor:
    b, t, _ = x.shape
    return x.view(b, t, heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# --------------------------------------------------------------------------- attention, by module


@structure(sequence)
class MultiheadSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(20, 4, batch_first=True), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0])


@structure(sequence)
class MultiheadSelfTimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(20, 24), nn.MultiheadAttention(24, 3)
        self.last = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(0, 1)
        x = x + self.attention(x, x, x)[0]
        return self.last(x.transpose(0, 1))


@structure(both(sequence, memory))
class MultiheadCross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 4, kdim=14, vdim=14, batch_first=True)
        self.last = nn.Linear(20, 6)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.attention(x, memory, memory)
        return self.last(attended), weights


@structure(both(sequence, lambda: (torch.tensor([[0] * 7, [0] * 5 + [1] * 2]),)))
class MultiheadMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 4, batch_first=True, add_bias_kv=True)
        self.last = nn.Linear(20, 6)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, key_padding_mask=padding.bool())[0])


def encoder_layer(norm_first: bool, batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(
        20, 4, 36, norm_first=norm_first, batch_first=batch_first, activation="gelu"
    )


register("encoder_layer", lambda: encoder_layer(False, True), sequence)
register("encoder_layer_norm_first", lambda: encoder_layer(True, True), sequence)
register("encoder_layer_time_first", lambda: encoder_layer(True, False), normal(3, 20, batch=6))
register(
    "encoder",
    lambda: nn.Sequential(
        nn.Linear(20, 28),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(28, 4, 44, batch_first=True), 2, enable_nested_tensor=False
        ),
        nn.Linear(28, 6),
    ),
    sequence,
)
register(
    "decoder_layer",
    lambda: nn.TransformerDecoderLayer(20, 4, 36, batch_first=True),
    both(sequence, normal(9, 20, seed=2)),
)


@structure(both(sequence, lambda: (torch.tensor([[0] * 7, [0] * 5 + [1] * 2]),)))
class EncoderMasked(nn.Module):
    """Torch's fused encoder, which is not traced, leaves zeros at padded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = (
            nn.TransformerEncoder(encoder_layer(False, True), 2),
            nn.Linear(20, 6),
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding.bool())
        return self.last(x).view(x.shape[0], 42)


# -------------------------------------------------------------------------- attention, by hand


class SeparateProjections(nn.Module):
    """Separate query, key and value of 4 heads of 6; what differs is how they attend."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(20, 24), nn.Linear(20, 24), nn.Linear(20, 24)
        self.out = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        return self.out(join_heads(self.attend(q, k, v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@structure(sequence)
class AttentionFused(SeparateProjections):
    pass


@structure(sequence)
class AttentionCausal(SeparateProjections):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@structure(sequence)
class AttentionByMatmul(SeparateProjections):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        return scores.softmax(-1) @ v


@structure(sequence)
class AttentionByEinsum(SeparateProjections):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhqd,bhkd->bhqk", q * 6**-0.5, k).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@structure(sequence)
class AttentionByBmm(SeparateProjections):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, _ = q.shape
        q, k, v = (x.reshape(b * h, t, -1) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT, beta=0, alpha=0.4)
        return torch.bmm(scores.softmax(2), v).view(b, h, t, -1)


@structure(sequence)
class AttentionLinear(SeparateProjections):
    """Kernel attention: the state is [head, key, value], no softmax over time."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhtd,bhte->bhde", k, v)
        norm = torch.einsum("bhtd,bhd->bht", q, k.sum(2))
        return torch.einsum("bhtd,bhde->bhte", q, state) / norm[..., None]


@structure(sequence)
class AttentionLiteralSizes(SeparateProjections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(-1, 7, 4, 6).permute(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        x = self.attend(q, k, v).permute(0, 2, 1, 3).contiguous()
        return self.out(x.view(-1, 7, 24))


@structure(sequence)
class AttentionWithBias(SeparateProjections):
    """A learned bias per head and distance, gathered by a constant index."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(13, 4))
        self.register_buffer("index", torch.arange(7)[:, None] - torch.arange(7) + 6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(7, 7, -1).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, bias.unsqueeze(0))


@structure(sequence)
class AttentionCausalBuffer(SeparateProjections):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(12, 12, dtype=torch.bool).tril()[None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(2)
        scores = q @ k.mT * 0.4
        return scores.masked_fill(~self.mask[:, :, :t, :t], -1e9).softmax(-1) @ v


@structure(sequence)
class AttentionNormalisedHeads(SeparateProjections):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(6), nn.RMSNorm(6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


@structure(sequence)
class AttentionHeadScale(SeparateProjections):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scale * F.scaled_dot_product_attention(q, k, v)


@structure(sequence)
class RotaryHalves(SeparateProjections):
    """Rotary embedding as Llama writes it: the first half turns with the second."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = q.size(-1)
        frequency = 1 / 100 ** (torch.arange(0, d, 2) / d)
        angle = torch.arange(q.size(2))[:, None] * frequency
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

        def rotate(x: Tensor) -> Tensor:
            turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
            return x * cos + turned * sin

        return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


@structure(sequence)
class RotaryPairs(SeparateProjections):
    """Rotary embedding as GPT-J writes it: neighbours turn together."""

    angle: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(12)[:, None] * 1 / 100 ** (torch.arange(0, 6, 2) / 6)
        self.register_buffer("angle", angle)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = self.angle[: q.size(2)].cos(), self.angle[: q.size(2)].sin()

        def rotate(x: Tensor) -> Tensor:
            even, odd = x[..., ::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


class FusedProjection(nn.Module):
    """One linear layer for query, key and value of 4 heads of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(20, 72), nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.separate(self.qkv(x))
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))

    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(split_heads(part) for part in x.chunk(3, dim=-1))


@structure(sequence)
class QkvChunk(FusedProjection):
    pass


@structure(sequence)
class QkvSplitLiteral(FusedProjection):
    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(split_heads(part) for part in x.split(24, dim=2))


@structure(sequence)
class QkvUnbind(FusedProjection):
    """As timm writes it."""

    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        b, t, _ = x.shape
        return x.reshape(b, t, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)


@structure(sequence)
class QkvIndexed(FusedProjection):
    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        b, t, c = x.shape
        x = x.reshape(b, t, 3, 4, c // 12).permute(2, 0, 3, 1, 4)
        return x[0], x[1], x[2]


@structure(sequence)
class QkvInterleaved(FusedProjection):
    """Each head's query, key and value lie together, as in Megatron and BLOOM."""

    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (4, 18)).transpose(1, 2).split(6, dim=-1)


@structure(sequence)
class QkvSlices(FusedProjection):
    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(split_heads, (x[..., :24], x[..., 24:48], x[..., 48:])))


class GroupedQueries(nn.Module):
    """6 query heads of 4, 2 key-value heads."""

    def __init__(self, values: int = 2) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(20, 24), nn.Linear(24, 20)
        self.key, self.value = nn.Linear(20, 4 * values), nn.Linear(20, 4 * values)
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.query(x), 6)
        k, v = split_heads(self.key(x), self.values), split_heads(self.value(x), self.values)
        return self.out(join_heads(self.attend(q, k, v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        return F.scaled_dot_product_attention(q, k, v)


@structure(sequence)
class GroupedRepeat(GroupedQueries):
    pass


@structure(sequence)
class GroupedExpand(GroupedQueries):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def repeat(x: Tensor) -> Tensor:
            b, h, t, d = x.shape
            return x[:, :, None].expand(b, h, 3, t, d).reshape(b, h * 3, t, d)

        return F.scaled_dot_product_attention(q, repeat(k), repeat(v))


@structure(sequence)
class GroupedNative(GroupedQueries):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@structure(sequence)
class GroupedEinsum(GroupedQueries):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bgrqd,bgkd->bgrqk", q.unflatten(1, (2, 3)), k).div(2).softmax(-1)
        return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).flatten(1, 2)


@structure(sequence)
class MultiQuery(GroupedQueries):
    def __init__(self) -> None:
        super().__init__(values=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 2).softmax(-1) @ v


@structure(sequence)
class PrefixKeys(SeparateProjections):
    """Learned keys and values before those of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(1, 4, 3, 6))
        self.values = nn.Parameter(torch.empty(1, 4, 3, 6))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat([self.keys.expand(k.size(0), -1, -1, -1), k], 2)
        v = torch.cat([self.values.expand(v.size(0), -1, -1, -1), v], 2)
        return F.scaled_dot_product_attention(q, k, v)


@structure(sequence)
class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 24), nn.Linear(24, 6)
        self.token = nn.Parameter(torch.empty(1, 1, 24))
        self.position = nn.Parameter(torch.empty(1, 8, 24))
        self.layer = nn.Sequential(
            nn.LayerNorm(24), nn.Linear(24, 36), nn.GELU(), nn.Linear(36, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.size(0), -1, -1), self.first(x)], 1) + self.position
        x = x + self.layer(x)
        return self.last(x[:, 0] * x[:, 1:].mean(1))


@structure(sequence)
class AttentionPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.score, self.last = nn.Linear(20, 24), nn.Linear(20, 1), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.score(x).softmax(1) * self.value(x)).sum(dim=1))


@structure(normal(12, 10, 9))
class WindowedAttention(SeparateProjections):
    """An image [batch, channel, 10, 9] in windows of 5 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 2, 3, 1).roll((-2, -1), (1, 2))
        b, _, _, c = x.shape
        x = x.view(b, 2, 5, 3, 3, c).transpose(2, 3).reshape(-1, 15, c)
        x = super().forward(x)
        return x.view(b, 2, 3, 5, 3, c).transpose(2, 3).reshape(b, 10, 9, c)


# ------------------------------------------------------------------------------------- tokens


register("embedding", lambda: nn.Sequential(nn.Embedding(31, 20), nn.Linear(20, 6)), ids)
register(
    "embedding_bag",
    lambda: nn.Sequential(nn.EmbeddingBag(31, 20, mode="mean"), nn.ReLU(), nn.Linear(20, 6)),
    ids,
)


@structure(ids)
class EmbeddingWithPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(31, 20, padding_idx=0), nn.Embedding(12, 20)
        self.last = nn.Linear(20, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return self.last(self.tokens(tokens) + self.positions(positions))


@structure(ids)
class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(31, 20), nn.Linear(20, 20)
        self.decoder = nn.Linear(20, 31)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.middle(self.embedding(tokens)).relu())


@structure(ids)
class TiedByMatmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = (
            nn.Embedding(31, 12),
            nn.Linear(12, 20),
            nn.Linear(20, 12),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(self.embedding(tokens)).relu()) @ self.embedding.weight.t()


@structure(ids)
class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(31, 20), nn.Linear(20, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.first(F.one_hot(tokens, 31).float()).relu())


register(
    "feed_forward_stack",
    lambda: nn.Sequential(
        *(
            layer
            for _ in range(3)
            for layer in (nn.LayerNorm(20), nn.Linear(20, 36), nn.GELU(), nn.Linear(36, 20))
        )
    ),
    sequence,
)
register("linear_on_time", partial(nn.Linear, 7, 6), normal(20, 7))
