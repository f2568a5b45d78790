"""Fused attention kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.layout import Axis, Layout, Product, size_of
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_attention_math_for_mps,
)
def attention(call: Call) -> Sequence[Layouts]:
    """Let queries `[*batch, heads, time, size]` meet keys of that size; a mask shares the heads.

    With grouped queries, the query heads are the key heads times the queries of each.
    """
    query, key, value = (call.layouts(name) for name in ("query", "key", "value"))
    for key_layout, value_layout in zip(key[:-2], value[:-2], strict=True):
        call.unify(key_layout, value_layout)
    for query_layout, key_layout in zip(query[:-2], key[:-2], strict=True):
        _unify_heads(call, query_layout, key_layout)
    call.unify(query[-1], key[-1])
    call.unify(query[-1], value[-1])
    call.unify(key[-2], value[-2])
    call.renormalise(key[-2], "a softmax over these positions")
    # `scores[query_time, key_time]` is masked by which of the two is the larger number.
    if call.arguments.get("is_causal"):
        for layout in (query[-2], key[-2]):
            call.fix(layout, "positions are compared by number")
    result = [*query[:-1], value[-1]]
    mask = next(
        (
            call.arguments[mask_name]
            for mask_name in ("attn_mask", "attn_bias")
            if call.arguments.get(mask_name) is not None
        ),
        None,
    )
    if mask is not None:
        # The scores are `[*batch, heads, query_time, key_time]`.
        _unify_mask(call, call.layouts_of(mask), [*query[:-1], key[-2]])
    return [result, query[:-1]]


def _unify_heads(call: Call, query: Layout, key: Layout) -> None:
    queries_per_key = size_of(query) // size_of(key)
    # 12 query heads on 4 key heads: `(4 3)`, the three queries of a key next to each other.
    call.unify(query, key if queries_per_key == 1 else Product((key, Axis(queries_per_key))))


def _unify_mask(call: Call, mask: Layouts, scores: Layouts) -> None:
    for mask_layout, score_layout in zip(reversed(mask), reversed(scores), strict=False):
        if size_of(mask_layout) > 1:
            call.unify(mask_layout, score_layout)
