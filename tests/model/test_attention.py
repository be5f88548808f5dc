"""The attention layout by its own rule, without recordings, and the corners a rank may meet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagel_ds.model.attention import BACKENDS, AttentionLayout, attend
from bagel_ds.model.batch import CAUSAL, FULL, NOISE

samples = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([CAUSAL, FULL, NOISE])), min_size=1, max_size=5), max_size=4
)


def flat(structure: list[list[tuple[int, str]]]) -> tuple[list[int], list[int], list[str]]:
    lens = [sum(length for length, _ in sample) for sample in structure]
    splits = [split for sample in structure for split in sample]
    return lens, [length for length, _ in splits], [mode for _, mode in splits]


def rule(structure: list[list[tuple[int, str]]]) -> torch.Tensor:
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


@given(samples)
def test_layout_follows_the_rule(structure: list[list[tuple[int, str]]]) -> None:
    assert torch.equal(AttentionLayout.from_splits(*flat(structure)).dense_mask(), rule(structure))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_rows_and_zero_gradients(backend: str) -> None:
    q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    output = attend(q, k, v, AttentionLayout.images([]), backend)
    assert output.shape == (0, 4, 8)
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert gradient.shape[0] == 0
