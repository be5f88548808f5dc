"""The decomposition into two calls of a varlen kernel, and what torch's and flash-attn's functions are given."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bagel_ds.model.attention import flash_package, flash_torch
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.attention.varlen import Permutation, plan, varlen, varlen_reference
from bagel_ds.model.batch import CAUSAL, FULL, NOISE
from tests.model.attention.structures import Structure, cached_lens, dense, drawn, layouts, samples, with_gradients

MIXED = AttentionLayout.from_splits([20, 9], [5, 6, 4, 5, 9], [CAUSAL, NOISE, FULL, CAUSAL, CAUSAL])


@given(samples, st.data())
def test_two_calls_equal_a_dense_mask(structure: Structure, data: st.DataObject) -> None:
    """Forward and backward, also behind a cache of some samples."""
    for layout in layouts(structure, data.draw(cached_lens(structure))):
        tensors = drawn(layout)
        found = with_gradients(varlen(layout, varlen_reference), tensors)
        for one, expected in zip(found, with_gradients(dense(layout), tensors)):
            torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_lengths_are_those_that_the_kernels_take() -> None:
    calls, queries, keys = plan(MIXED, torch.device("cpu"))
    assert [call.causal for call in calls] == [True, False]
    for call, q_lens, k_lens in zip(calls, ([5, 5, 9], [6, 4]), ([5, 14, 9], [11, 9])):
        assert call.cu_q.dtype == call.cu_k.dtype == torch.int32
        assert call.cu_q.diff().tolist() == q_lens and call.cu_k.diff().tolist() == k_lens
        assert call.cu_q.is_contiguous() and call.cu_k.is_contiguous()
        assert (call.max_q, call.max_k, call.queries, call.keys) == (max(q_lens), max(k_lens), sum(q_lens), sum(k_lens))
    assert isinstance(queries, Permutation) and isinstance(keys, Tensor)


@pytest.mark.parametrize(
    ("layout", "calls"),
    [
        (AttentionLayout.images([4, 9, 1]), 1),
        (AttentionLayout.from_splits([7, 5], [7, 5], [CAUSAL, CAUSAL]), 1),
        (AttentionLayout.from_splits([1, 1, 1], [1, 1, 1], [CAUSAL] * 3, [40, 7, 0]), 1),
    ],
    ids=["images", "text", "a token behind each cache"],
)
def test_rows_in_the_kernels_order_are_not_copied(layout: AttentionLayout, calls: int) -> None:
    found = plan(layout, torch.device("cpu"))
    assert len(found.calls) == calls and found.queries is None and found.keys is None


def test_without_shared_keys_the_backward_pass_adds_nothing_up() -> None:
    """Text next to images of other samples: two calls, but every key stands there once."""
    found = plan(AttentionLayout.from_splits([4, 5, 4], [4, 5, 4], [CAUSAL, FULL, CAUSAL]), torch.device("cpu"))
    assert len(found.calls) == 2 and isinstance(found.keys, Permutation)


def test_gradients_of_shared_keys_are_summed_in_fp32() -> None:
    """A prefix that 64 segments see: sums in bf16 would lose the small gradients."""
    layout = AttentionLayout.from_splits([4 + 64 * 8], [4] + [8] * 64, [FULL] + [NOISE] * 64)
    tensors = [x.bfloat16() for x in drawn(layout, heads=(2, 2))]
    exact = with_gradients(dense(layout), [x.double() for x in tensors])
    found = with_gradients(
        varlen(layout, lambda *a: varlen_reference(*(x.double() if i < 3 else x for i, x in enumerate(a))).bfloat16()),
        tensors,
    )
    for one, expected in zip(found[2:], exact[2:]):
        assert (one[:4].double() - expected[:4]).norm() <= 4e-3 * expected[:4].norm()


def test_a_plan_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(
        "bagel_ds.model.attention.varlen.plan", lambda layout, device: made.append(device) or plan(layout, device)
    )
    attend = varlen(MIXED, varlen_reference)
    q, k, v, _ = drawn(MIXED)
    attend(q, k, v)
    attend(q, k, v)
    assert made == [torch.device("cpu")]


# ---------------------------------------------------------------------------- the functions of torch and flash-attn
def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size in ((-1, 0), (-1, -1))
    return varlen_reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0 if is_causal else -1))


@pytest.mark.parametrize("function", [torch_2_13, torch_2_11, torch_2_10])
def test_torchs_function_is_called_as_its_version_wants(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    flash_torch._parameters.cache_clear()
    try:
        tensors = drawn(MIXED)
        for found, expected in zip(
            with_gradients(flash_torch.prepare(MIXED), tensors), with_gradients(dense(MIXED), tensors)
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    finally:
        flash_torch._parameters.cache_clear()


def test_the_installed_torchs_function_takes_what_it_is_given() -> None:
    """Its kernel has no CPU, but its arguments are bound and its heads checked before that shows."""
    q, k, v, _ = (x.bfloat16() for x in drawn(MIXED))
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        flash_torch.prepare(MIXED)(q, k, v)


def test_flash_attn_gets_keys_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):  # type: ignore[no-untyped-def]
        assert (q.shape[1], k.shape[1]) == (4, 2) and dropout_p == 0.0 and softmax_scale is None
        return varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=function))  # type: ignore[arg-type]
    tensors = drawn(MIXED)
    for found, expected in zip(
        with_gradients(flash_package.prepare(MIXED), tensors), with_gradients(dense(MIXED), tensors)
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
