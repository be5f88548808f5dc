"""Attention by torch's scaled_dot_product_attention: one call per segment over exactly the keys it sees.

Shape legend: Q query tokens, T tokens (keys), H heads, K key/value heads, D head dim; of a segment n queries and
m keys.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout


def prepare(layout: AttentionLayout) -> Attend:
    return partial(_attend_cached if any(layout.is_cached) else _attend, layout)


def _attend(layout: AttentionLayout, q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    groups = q_QHD.shape[1] // k_TKD.shape[1]
    queries = q_QHD.split(layout.segment_lens)
    keys = k_TKD.repeat_interleave(groups, dim=1).split(layout.segment_lens)
    values = v_TKD.repeat_interleave(groups, dim=1).split(layout.segment_lens)
    outputs = []
    for query, seen, causal in zip(queries, layout.visible, layout.is_causal):
        key = torch.cat([keys[segment] for segment in seen])
        value = torch.cat([values[segment] for segment in seen])
        outputs.append(_segment(query, key, value, causal))
    return torch.cat(outputs)


def _attend_cached(layout: AttentionLayout, q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """As `_attend`, but query heads that share a key head become rows of one, so the cache isn't copied per head."""
    groups, head_dim = q_QHD.shape[1] // k_TKD.shape[1], q_QHD.shape[2]
    queries = iter(q_QHD.split([n for n, cached in zip(layout.segment_lens, layout.is_cached) if not cached]))
    keys, values = k_TKD.split(layout.segment_lens), v_TKD.split(layout.segment_lens)
    outputs = []
    for seen, causal, cached in zip(layout.visible, layout.is_causal, layout.is_cached):
        if cached:
            continue
        query = next(queries)
        key = torch.cat([keys[segment] for segment in seen])
        value = torch.cat([values[segment] for segment in seen])
        if causal and len(query) > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            outputs.append(_segment(query, key, value, causal))
            continue
        rows_nKD = query.unflatten(1, (-1, groups)).transpose(1, 2).flatten(0, 1)
        found = _segment(rows_nKD, key, value, causal=False)
        outputs.append(found.unflatten(0, (-1, groups)).transpose(1, 2).reshape(len(query), -1, head_dim))
    return torch.cat(outputs)


def _segment(query_nHD: Tensor, key_mHD: Tensor, value_mHD: Tensor, causal: bool) -> Tensor:
    """Attention of one segment. With `causal` the last query sees all keys and each earlier one a key less."""
    n_query, n_key = len(query_nHD), len(key_mHD)
    mask = None
    if causal and n_key > n_query:
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=query_nHD.device).tril_(n_key - n_query)
    output = F.scaled_dot_product_attention(
        query_nHD.transpose(0, 1)[None],
        key_mHD.transpose(0, 1)[None],
        value_mHD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal and mask is None,
    )
    return output[0].transpose(0, 1)
