"""What one layer remembers of earlier calls: the keys and values of tokens that the network has read.

Guarantees: what is handed in is never written to, so sequences that share a beginning may share its tensors.

Shape legend: S samples of a call, T their new tokens, N keys of all samples, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer, by sample: [S] tensors [n, K, D], position-encoded, n = 0 for a new sample."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], sample_lens: Sequence[int]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)
        self._sample_lens = list(sample_lens)  # new tokens of each sample, sums to T

    def extend(self, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K, D] each: every sample's cached tokens, then its new ones. They are the cached ones from here on."""
        k_NKD, self.keys = self._joined(self.keys, k_TKD)
        v_NKD, self.values = self._joined(self.values, v_TKD)
        return k_NKD, v_NKD

    def _joined(self, cached: tuple[Tensor, ...], new_TKD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        pairs = zip(cached, new_TKD.split(self._sample_lens))
        joined = torch.cat([new_TKD[:0], *(tokens for pair in pairs for tokens in pair)])
        return joined, joined.split([len(old) + new for old, new in zip(cached, self._sample_lens)])
