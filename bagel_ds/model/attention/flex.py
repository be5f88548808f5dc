"""Attention by torch's FlexAttention: one compiled kernel that skips blocks of the pack in which nobody sees anybody.

Guarantees: no [T, T] mask exists. The table of blocks comes from per-token bounds, on the device. Lengths are padded to
few sizes, four per power of two, so that the kernel is compiled for these and not for each pack. On a CPU torch has no
backward pass for it.

Shape legend: Q query tokens, T tokens (keys), H heads, K key/value heads, D head dim, R rows of blocks (of queries),
B blocks of keys.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.attention.varlen import on_device

if TYPE_CHECKING:  # else imported where it is used: it imports torch's compiler, which takes seconds
    from torch.nn.attention.flex_attention import BlockMask

TITLE = "FlexAttention"
BLOCK = 128  # torch's default
_SHAPES = 256  # compiled kernels: padded lengths of queries and keys, of two head dims; torch's limit is 8


def prepare(layout: AttentionLayout) -> Attend:
    masks: dict[torch.device, BlockMask] = {}

    def attend(q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if q_QHD.device not in masks:
            masks[q_QHD.device] = block_mask(bounds(layout, q_QHD.device))
        mask = masks[q_QHD.device]
        queries, keys = mask.seq_lengths
        query = _padded(q_QHD, queries)
        key, value = _padded(k_TKD, keys), _padded(v_TKD, keys)
        shared = query.shape[1] != key.shape[1]
        output: Tensor = _kernel()(query, key, value, block_mask=mask, enable_gqa=shared)
        return output[0, :, : len(q_QHD)].transpose(0, 1)

    return attend


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, trains: bool) -> str | None:
    """Why the kernel can't take these; None where it should."""
    if device.type == "cpu" and trains:
        return "it has no backward pass on a CPU"
    return None


class Bounds(NamedTuple):
    """The mask rule as two comparisons, exact for every layout: a query sees a key iff

    key position <= reach of the query, and segment of the query <= last segment that sees the key.
    """

    reach: Tensor  # [Q] last key that a query sees: itself in a causal segment, else the segment's end; padding: -1
    segment: Tensor  # [Q]
    last: Tensor  # [T] the key's own segment if it is noise, else the sample's last; padding: -1


def padded_length(tokens: int) -> int:
    """The next of 128, 256, 384, 512, 640, ... in which a power of two is reached in four steps (or one block each)."""
    step = max(BLOCK, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def bounds(layout: AttentionLayout, device: torch.device) -> Bounds:
    """Bounds of all tokens, padded; all of it is computed on the device."""
    own = [segment for segment, cached in enumerate(layout.is_cached) if not cached]
    last = list(range(len(layout.segment_lens)))
    for segment, seen in enumerate(layout.visible):
        for other in seen:
            last[other] = segment  # segments come in order, so the last one that sees it stays
    starts = [0, *accumulate(layout.segment_lens)]
    queries, keys = sum(layout.segment_lens[segment] for segment in own), starts[-1]
    n_queries, n_keys = padded_length(queries), padded_length(keys)
    # The last of each list is the padding.
    lens = on_device([*(layout.segment_lens[segment] for segment in own), n_queries - queries], torch.int64, device)
    numbers = on_device([*own, 0], torch.int64, device)
    ends = on_device([*(starts[segment + 1] for segment in own), 0], torch.int64, device)
    causal = on_device([*(int(layout.is_causal[segment]) for segment in own), 0], torch.int64, device)
    key_lens = on_device([*layout.segment_lens, n_keys - keys], torch.int64, device)
    lasts = on_device([*last, -1], torch.int64, device)

    def per_query(values: Tensor) -> Tensor:
        return torch.repeat_interleave(values, lens, output_size=n_queries)

    before_own_end = per_query(lens.cumsum(0)) - torch.arange(n_queries, device=device)
    reach = per_query(ends) - torch.where(per_query(causal) > 0, before_own_end, 1)
    last_of_keys = torch.repeat_interleave(lasts, key_lens, output_size=n_keys)
    return Bounds(*(x.to(torch.int32) for x in (reach, per_query(numbers), last_of_keys)))


def block_mask(tokens: Bounds) -> BlockMask:
    """Which blocks hold pairs that see each other, and in which all do, from the extremes of each block's bounds.

    A few blocks at the edges of segments may be computed although all their pairs are masked.
    """
    from torch.nn.attention.flex_attention import BlockMask

    reach, segment, last = (x.unflatten(0, (-1, BLOCK)) for x in tokens)
    first_key = torch.arange(0, last.numel(), BLOCK, dtype=torch.int32, device=last.device)
    some_RB = (first_key <= reach.amax(1)[:, None]) & (segment.amin(1)[:, None] <= last.amax(1))
    all_RB = (first_key + BLOCK - 1 <= reach.amin(1)[:, None]) & (segment.amax(1)[:, None] <= last.amin(1))
    return BlockMask.from_kv_blocks(
        *_block_lists(some_RB & ~all_RB),
        *_block_lists(all_RB),
        BLOCK_SIZE=BLOCK,
        mask_mod=_rule(tokens),
        seq_lengths=(reach.numel(), last.numel()),
    )


def _rule(tokens: Bounds) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    reach, segment, last = tokens

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= reach[query]) & (segment[query] <= last[key])

    return sees


def _block_lists(table_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the number of its blocks [1, 1, R], and their numbers, in order and first [1, 1, R, B]; int32."""
    counts = table_RB.sum(1, dtype=torch.int32)
    first = table_RB.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], first[None, None]


def _padded(x_THD: Tensor, length: int) -> Tensor:
    """[1, H, length, D]"""
    return F.pad(x_THD, (0, 0, 0, 0, 0, length - len(x_THD))).transpose(0, 1)[None]


@cache
def _kernel() -> Callable[..., Any]:
    """`flex_attention`, compiled. Past its limit of shapes torch would take the dense form; with fullgraph it fails."""
    from torch.nn.attention.flex_attention import flex_attention

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _SHAPES)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
