"""The mask rule: which token of a pack sees which.

Guarantees: query i sees key j iff both are of one sample and (j <= i or both in the same full/noise split) and j is not
in a noise split other than i's own. No [T, T] mask exists: the rule is exact per split, because every split sees whole
earlier splits and itself. A key/value cache holds earlier splits of a sample: keys without queries, under the same
rule.

Shape legend: T tokens of a pack, S segments.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from bagel_ds.model.batch import CAUSAL, FULL, NOISE


class AttentionLayout(NamedTuple):
    """Who sees whom, by segment: a run of tokens that share what they see before themselves.

    Segments are the pack's splits, neighbouring causal ones of a sample merged.
    """

    segment_lens: tuple[int, ...]  # [S], sums to T
    visible: tuple[tuple[int, ...], ...]  # per segment: segments it sees, in order, itself last
    is_causal: tuple[bool, ...]  # per segment: causal inside itself, else all-to-all
    is_cached: tuple[bool, ...]  # per segment: its keys come from a cache and it has no queries

    @classmethod
    def from_splits(
        cls,
        sample_lens: Sequence[int],
        split_lens: Sequence[int],
        attn_modes: Sequence[str],
        cached_lens: Sequence[int] = (),
    ) -> AttentionLayout:
        """The layout of a pack; arguments as in `PackedBatch`.

        `cached_lens`: per sample, tokens that came before its own and are seen by all of them.
        """
        assert sum(sample_lens) == sum(split_lens) and len(split_lens) == len(attn_modes)
        sample_ends = set(accumulate(sample_lens))
        cached = iter(cached_lens or (0,) * len(sample_lens))
        lens: list[int] = []
        visible: list[tuple[int, ...]] = []
        is_causal: list[bool] = []
        is_cached: list[bool] = []
        before: tuple[int, ...] = ()  # segments of this sample that later ones see
        at_sample_start, position = True, 0
        for length, mode in zip(split_lens, attn_modes):
            assert mode in (CAUSAL, FULL, NOISE), mode
            if at_sample_start and (context := next(cached)):
                before = (len(lens),)
                lens.append(context)
                visible.append(before)
                is_causal.append(False)
                is_cached.append(True)
            if mode == CAUSAL and not at_sample_start and is_causal[-1]:
                lens[-1] += length
            else:
                segment = len(lens)
                lens.append(length)
                visible.append((*before, segment))
                is_causal.append(mode == CAUSAL)
                is_cached.append(False)
                if mode != NOISE:
                    before = (*before, segment)
            position += length
            at_sample_start = position in sample_ends
            if at_sample_start:
                before = ()
        return cls(tuple(lens), tuple(visible), tuple(is_causal), tuple(is_cached))

    @classmethod
    def images(cls, lengths: Sequence[int]) -> AttentionLayout:
        """Every image sees itself and nothing else (the ViT's layout)."""
        return cls.from_splits(lengths, lengths, (FULL,) * len(lengths))

    def dense_mask(self) -> Tensor:
        """[T, T] bool, True = may attend; T includes cached tokens. For tests and pictures only."""
        starts = [0, *accumulate(self.segment_lens)]
        mask = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
        for segment, seen in enumerate(self.visible):
            rows = slice(starts[segment], starts[segment + 1])
            for other in seen:
                mask[rows, starts[other] : starts[other + 1]] = True
            if self.is_causal[segment]:
                mask[rows, rows].tril_()
        return mask

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention computes."""
        pairs = 0
        for length, seen, causal, cached in zip(self.segment_lens, self.visible, self.is_causal, self.is_cached):
            if not cached:
                pairs += length * sum(self.segment_lens[other] for other in seen)
                pairs -= length * (length - 1) // 2 if causal else 0
        return pairs
