"""Attention over packed samples: one interface, one function per kernel.

Guarantees: query i sees key j iff both are of one sample and (j <= i or both in the same full/noise split) and j is not
in a noise split other than i's own (REFERENCE 7). No [T, T] mask exists: the rule is exact per split, because every
split sees whole earlier splits and itself. Zero tokens are fine and stay connected to q, k and v.

With a KV cache a sample's cached tokens come before its new ones: new tokens see all of them, and only new tokens ask.

Shape legend: T tokens of a pack, N keys (T, and what is cached), H heads, K key/value heads, D head dim, S segments.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_ds.model.batch import CAUSAL, FULL, NOISE


class AttentionLayout(NamedTuple):
    """Who sees whom, by segment: a run of tokens that share what they see before themselves.

    Segments are the pack's splits, neighbouring causal ones of a sample merged. Keys are the same segments, each
    sample's cached tokens as one more before them.
    """

    segment_lens: tuple[int, ...]  # [S], sums to T
    visible: tuple[tuple[int, ...], ...]  # per segment: key segments it sees, in order, itself last
    is_causal: tuple[bool, ...]  # per segment: causal inside itself, else all-to-all
    key_lens: tuple[int, ...]  # per key segment; sums to N

    @classmethod
    def from_splits(
        cls,
        sample_lens: Sequence[int],
        split_lens: Sequence[int],
        attn_modes: Sequence[str],
        cached_lens: Sequence[int] = (),
    ) -> AttentionLayout:
        """The layout of a pack; arguments as in `PackedBatch`. `cached_lens`: cached tokens of each sample, if any."""
        assert sum(sample_lens) == sum(split_lens) and len(split_lens) == len(attn_modes)
        assert len(cached_lens) in (0, len(sample_lens))
        cached = iter(cached_lens or [0] * len(sample_lens))
        sample_ends = set(accumulate(sample_lens))
        lens: list[int] = []
        key_lens: list[int] = []
        visible: list[tuple[int, ...]] = []
        is_causal: list[bool] = []
        before: tuple[int, ...] = ()  # key segments of this sample that later ones see
        at_sample_start, position = True, 0
        for length, mode in zip(split_lens, attn_modes):
            assert mode in (CAUSAL, FULL, NOISE), mode
            if at_sample_start:
                before = ()
                if past := next(cached):
                    before = (len(key_lens),)
                    key_lens.append(past)
            if mode == CAUSAL and not at_sample_start and is_causal[-1]:
                lens[-1] += length
                key_lens[-1] += length
            else:
                segment = len(key_lens)
                lens.append(length)
                key_lens.append(length)
                visible.append((*before, segment))
                is_causal.append(mode == CAUSAL)
                if mode != NOISE:
                    before = (*before, segment)
            position += length
            at_sample_start = position in sample_ends
        return cls(tuple(lens), tuple(visible), tuple(is_causal), tuple(key_lens))

    @classmethod
    def images(cls, lengths: Sequence[int]) -> AttentionLayout:
        """Every image sees itself and nothing else (the ViT's layout)."""
        return cls.from_splits(lengths, lengths, (FULL,) * len(lengths))

    def dense_mask(self) -> Tensor:
        """[T, N] bool, True = may attend. For tests and pictures; training never builds it."""
        rows_at, keys_at = [0, *accumulate(self.segment_lens)], [0, *accumulate(self.key_lens)]
        mask = torch.zeros(rows_at[-1], keys_at[-1], dtype=torch.bool)
        for segment, seen in enumerate(self.visible):
            rows = slice(rows_at[segment], rows_at[segment + 1])
            for other in seen:
                mask[rows, keys_at[other] : keys_at[other + 1]] = True
            if self.is_causal[segment]:
                mask[rows, keys_at[seen[-1]] : keys_at[seen[-1] + 1]].tril_()
        return mask


def attend(q_THD: Tensor, k_NKD: Tensor, v_NKD: Tensor, layout: AttentionLayout, backend: str = "sdpa") -> Tensor:
    """Softmax attention, scale 1/sqrt(D); key/value head j serves query heads [j*H/K, (j+1)*H/K). Returns [T, H, D]."""
    if not layout.segment_lens:
        # A rank without tokens must still produce (zero) gradients, or the others wait for it (ZeRO-3).
        return q_THD + 0 * (k_NKD.sum() + v_NKD.sum())
    return BACKENDS[backend](q_THD, k_NKD, v_NKD, layout)


def sdpa(q_THD: Tensor, k_NKD: Tensor, v_NKD: Tensor, layout: AttentionLayout) -> Tensor:
    """torch's scaled_dot_product_attention, one call per segment over exactly the keys it sees. Runs everywhere."""
    groups = q_THD.shape[1] // k_NKD.shape[1]
    queries = q_THD.split(layout.segment_lens)
    keys = k_NKD.repeat_interleave(groups, dim=1).split(layout.key_lens)
    values = v_NKD.repeat_interleave(groups, dim=1).split(layout.key_lens)
    outputs = []
    for query, seen, causal in zip(queries, layout.visible, layout.is_causal):
        key = torch.cat([keys[segment] for segment in seen])
        value = torch.cat([values[segment] for segment in seen])
        n_query, n_key = len(query), len(key)
        mask = None
        if causal and n_key > n_query:
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).tril_(n_key - n_query)
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=causal and mask is None,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]] = {"sdpa": sdpa}
