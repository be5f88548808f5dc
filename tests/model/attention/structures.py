"""Random packs by their splits, the mask rule token by token, and attention under a dense mask."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import CAUSAL, FULL, NOISE

Structure = list[list[tuple[int, str]]]  # per sample its splits: length, mode

samples = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([CAUSAL, FULL, NOISE])), min_size=1, max_size=5), max_size=4
)


def flat(structure: Structure) -> tuple[list[int], list[int], list[str]]:
    lens = [sum(length for length, _ in sample) for sample in structure]
    splits = [split for sample in structure for split in sample]
    return lens, [length for length, _ in splits], [mode for _, mode in splits]


def rule(structure: Structure) -> Tensor:
    """REFERENCE 7, token by token."""
    tokens = [
        (sample, split, mode)
        for sample, splits in enumerate(structure)
        for split, (length, mode) in enumerate(splits)
        for _ in range(length)
    ]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (sample_i, split_i, mode_i) in enumerate(tokens):
        for j, (sample_j, split_j, mode_j) in enumerate(tokens):
            own = (sample_i, split_i) == (sample_j, split_j)
            sees = j <= i or (own and mode_i in (FULL, NOISE))
            mask[i, j] = sample_i == sample_j and sees and not (mode_j == NOISE and not own)
    return mask


def cached_lens(structure: Structure, most: int = 5) -> st.SearchStrategy[list[int]]:
    """Tokens that stand before each sample in a cache."""
    return st.lists(st.integers(0, most), min_size=len(structure), max_size=len(structure))


def layouts(structure: Structure, cached: Sequence[int]) -> list[AttentionLayout]:
    """The structure's layout without a cache and behind one; none if it has no samples."""
    return [AttentionLayout.from_splits(*flat(structure), behind) for behind in ((), cached)] if structure else []


def query_rows(layout: AttentionLayout) -> Tensor:
    """[Q] positions of the layout's queries among its keys."""
    is_query = [not cached for n, cached in zip(layout.segment_lens, layout.is_cached) for _ in range(n)]
    return torch.tensor(is_query, dtype=torch.bool).nonzero()[:, 0]


class Tensors(NamedTuple):
    q: Tensor  # [Q, 4, D]
    k: Tensor  # [T, 2, D]
    v: Tensor  # [T, 2, D]
    weight: Tensor  # [Q, 4, D], of the output in a loss


def drawn(layout: AttentionLayout, head_dim: int = 8, device: str = "cpu", heads: tuple[int, int] = (4, 2)) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    queries, keys = len(query_rows(layout)), sum(layout.segment_lens)
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return Tensors(*(torch.randn(*shape, head_dim, generator=generator).to(device) for shape in shapes))


def with_gradients(attend: Attend, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients by q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    output = attend(q, k, v)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), tensors[3])]


def dense(layout: AttentionLayout) -> Attend:
    """Attention under the layout's dense mask."""
    mask = layout.dense_mask()[query_rows(layout)]

    def attend(q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        groups = q_QHD.shape[1] // k_TKD.shape[1]
        q, k, v = (
            x.transpose(0, 1) for x in (q_QHD, k_TKD.repeat_interleave(groups, 1), v_TKD.repeat_interleave(groups, 1))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device)).transpose(0, 1)

    return attend
