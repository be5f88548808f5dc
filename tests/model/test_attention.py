"""The attention layout by its own rule, without recordings, and the corners a rank may meet."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagel_ds.model.attention import sdpa
from bagel_ds.model.attention.backends import BACKENDS, Attend, attention_backend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import CAUSAL, FULL, NOISE
from tests.memory.test_phases import network, pack

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
    output = attention_backend(backend)(AttentionLayout.images([]))(q, k, v)
    assert output.shape == (0, 4, 8)
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert gradient.shape[0] == 0


@given(samples, st.data())
def test_a_cache_is_the_splits_that_came_before(structure: list[list[tuple[int, str]]], data: st.DataObject) -> None:
    """The rows of the tokens behind a cache, whose noise splits are not kept, are those of the whole pack."""
    whole = AttentionLayout.from_splits(*flat(structure)).dense_mask()
    behind, cached_lens, keys, queries, start = [], [], [], [], 0
    for sample in structure:
        cut = data.draw(st.integers(0, len(sample) - 1))
        cached = 0
        for number, (length, mode) in enumerate(sample):
            tokens = range(start, start + length)
            start += length
            if number >= cut:
                queries += tokens
            elif mode == NOISE:
                continue
            else:
                cached += length
            keys += tokens
        cached_lens.append(cached)
        behind.append(sample[cut:])
    layout = AttentionLayout.from_splits(*flat(behind), cached_lens)
    rows = [row for row, key in enumerate(keys) if key in set(queries)]
    expected = whole[queries][:, keys]
    assert torch.equal(layout.dense_mask()[rows], expected)
    assert layout.pairs == int(expected.sum())
    if not any(layout.is_cached) or not queries:
        return
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(queries), 4, 8, generator=generator)
    k, v = (torch.randn(len(keys), 2, 8, generator=generator) for _ in range(2))
    for backend in BACKENDS:
        found = attention_backend(backend)(layout)(q, k, v)
        heads = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *heads, attn_mask=expected)
        torch.testing.assert_close(found, dense.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_every_layer_attends_with_the_backend_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Language model and ViT; a layer that ignores `--attn` makes fewer calls."""
    calls: list[int] = []

    def prepare(layout: AttentionLayout) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            calls.append(len(q))
            return sdpa.prepare(layout)(q, k, v)

        return attend

    monkeypatch.setitem(BACKENDS, "counting", "counting_attention")
    monkeypatch.setitem(sys.modules, "counting_attention", types.SimpleNamespace(prepare=prepare))  # type: ignore[arg-type]
    config = dataclasses.replace(network(), attention="counting")
    with torch.no_grad():
        Bagel(config)(pack(4, 2, 3), torch.zeros(2, 64))
    assert calls == [3] * config.vit.num_layers + [9] * config.llm.num_hidden_layers
