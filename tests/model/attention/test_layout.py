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
from tests.model.attention.structures import (
    Structure,
    cached_lens,
    dense,
    drawn,
    flat,
    layouts,
    query_rows,
    rule,
    samples,
    with_gradients,
)


@given(samples)
def test_layout_follows_the_rule(structure: Structure) -> None:
    assert torch.equal(AttentionLayout.from_splits(*flat(structure)).dense_mask(), rule(structure))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_rows_and_zero_gradients(backend: str) -> None:
    q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    output = attention_backend(backend)(AttentionLayout.images([]))(q, k, v)
    assert output.shape == (0, 4, 8)
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert gradient.shape[0] == 0


@given(samples, st.data())
def test_a_cache_is_the_splits_that_came_before(structure: Structure, data: st.DataObject) -> None:
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
    expected = whole[queries][:, keys]
    assert torch.equal(layout.dense_mask()[query_rows(layout)], expected)
    assert layout.pairs == int(expected.sum())


@given(samples, st.data())
def test_sdpa_equals_a_dense_mask(structure: Structure, data: st.DataObject) -> None:
    for layout in layouts(structure, data.draw(cached_lens(structure))):
        tensors = drawn(layout)
        for found, expected in zip(
            with_gradients(sdpa.prepare(layout), tensors), with_gradients(dense(layout), tensors)
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sdpa_copies_no_keys_that_lie_side_by_side_behind_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is appended to a long context must not move the context."""
    layout = AttentionLayout.from_splits([1, 2], [1, 2], [CAUSAL, FULL], [50, 60])
    q, k, v, _ = drawn(layout)
    taken: list[torch.Tensor] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        taken.extend((key, value))
        return real(query, key, value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    sdpa.prepare(layout)(q, k, v)
    assert len(taken) == 4
    for number, found in enumerate(taken):
        assert found.untyped_storage().data_ptr() == (k, v)[number % 2].untyped_storage().data_ptr()


@pytest.mark.parametrize("part", ["attention", "vit_attention"])
def test_every_layer_attends_with_the_backend_that_was_chosen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the language model and of the ViT; a layer that ignores `--attn` makes fewer calls."""
    calls: list[int] = []

    def prepare(layout: AttentionLayout) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            calls.append(len(q))
            return sdpa.prepare(layout)(q, k, v)

        return attend

    monkeypatch.setitem(BACKENDS, "counting", "counting_attention")
    monkeypatch.setitem(sys.modules, "counting_attention", types.SimpleNamespace(prepare=prepare))  # type: ignore[arg-type]
    config = dataclasses.replace(network(), **{part: "counting"})
    with torch.no_grad():
        Bagel(config)(pack(4, 2, 3), torch.zeros(2, 64))
    expected = {"vit_attention": [3] * config.vit.num_layers, "attention": [9] * config.llm.num_hidden_layers}
    assert calls == expected[part]
