"""Attention by torch's scaled_dot_product_attention: one call per segment over exactly the keys it sees.

Guarantees: every device, dtype and head dim. Keys and values are not repeated for the query heads that share them,
except on a GPU where only a kernel works that can't share them (fp32, or a GPU without flash attention); torch would
otherwise form the whole matrix of scores there.

Shape legend: Q query tokens, T tokens (keys), H heads, K key/value heads, D head dim; of a segment n queries and
m keys.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout

TITLE = "torch's scaled_dot_product_attention"


def prepare(layout: AttentionLayout) -> Attend:
    return partial(_attend_cached if any(layout.is_cached) else _attend, layout)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, trains: bool) -> None:
    """It takes everything."""


def _attend(layout: AttentionLayout, q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    queries, keys, values = (x.split(layout.segment_lens) for x in (q_QHD, k_TKD, v_TKD))
    outputs = [
        _segment(query, _joined(keys, seen), _joined(values, seen), causal)
        for query, seen, causal in zip(queries, layout.visible, layout.is_causal)
    ]
    return torch.cat(outputs)


def _joined(parts: Sequence[Tensor], seen: Sequence[int]) -> Tensor:
    return parts[seen[0]] if len(seen) == 1 else torch.cat([parts[segment] for segment in seen])


def _attend_cached(layout: AttentionLayout, q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """As `_attend`, but made for few queries and without a backward pass.

    Query heads that share a key head become rows of one, so that the cache is read once for all of them. Keys that lie
    side by side, as the cache and what follows it do, are not copied.
    """
    groups, head_dim = q_QHD.shape[1] // k_TKD.shape[1], q_QHD.shape[2]
    queries = iter(q_QHD.split([n for n, cached in zip(layout.segment_lens, layout.is_cached) if not cached]))
    ends = list(accumulate(layout.segment_lens))
    outputs = []
    for seen, causal, cached in zip(layout.visible, layout.is_causal, layout.is_cached):
        if cached:
            continue
        query = next(queries)
        if seen[-1] - seen[0] == len(seen) - 1:
            side_by_side = slice(ends[seen[0]] - layout.segment_lens[seen[0]], ends[seen[-1]])
            key, value = k_TKD[side_by_side], v_TKD[side_by_side]
        else:
            key, value = (_joined(x.split(layout.segment_lens), seen) for x in (k_TKD, v_TKD))
        if causal and len(query) > 1:
            outputs.append(_segment(query, key, value, causal))
            continue
        rows_nKD = query.unflatten(1, (-1, groups)).transpose(1, 2).flatten(0, 1)
        found = _segment(rows_nKD, key, value, causal=False)
        outputs.append(found.unflatten(0, (-1, groups)).transpose(1, 2).reshape(len(query), -1, head_dim))
    return torch.cat(outputs)


def _segment(query_nHD: Tensor, key_mKD: Tensor, value_mKD: Tensor, causal: bool) -> Tensor:
    """Attention of one segment. With `causal` the last query sees all keys and each earlier one a key less."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query_nHD, key_mKD, value_mKD))
    groups, n, m = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    shared = groups > 1
    if shared and query.is_cuda and not can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True)):
        key, value, shared = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    mask: Tensor | None = None
    if causal and m > n and query.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # it imports torch's compiler, which takes seconds

        mask = causal_lower_right(n, m)  # not a mask but a marker: the kernel itself leaves keys out
    elif causal and m > n:
        mask = torch.ones(n, m, dtype=torch.bool).tril_(m - n)  # a CPU has no such kernel
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=shared
    )
    return output[0].transpose(0, 1)
