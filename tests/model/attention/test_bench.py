"""What `bench/attention.py` compares: equal results of all ways, and packs that are as long as asked for."""

from __future__ import annotations

import pytest
import torch

from bagel_ds.model.attention.varlen import varlen_reference
from bench.attention import Inputs, original, without_copies
from bench.attention_packs import KINDS, random_pack, recorded_packs, shared_prefix
from tests.model.attention.structures import dense, drawn, with_gradients


@pytest.mark.parametrize("kind", KINDS)
def test_the_originals_way_gives_the_same(kind: str) -> None:
    layout = random_pack(kind, 300)
    assert sum(layout.segment_lens) == 300 and layout == random_pack(kind, 300) != random_pack(kind, 300, seed=1)
    tensors = drawn(layout)
    for found, expected in zip(with_gradients(original(layout), tensors), with_gradients(dense(layout), tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_recorded_packs_are_filled_too() -> None:
    for layout in recorded_packs(700).values():
        assert sum(layout.segment_lens) == 700


def test_the_kernel_by_itself_computes_the_same_rows() -> None:
    """In the order of its calls, which for one sample of a prefix and images is the sequence's."""
    layout = shared_prefix(20, 30, 10)
    assert layout.segment_lens == (20, 10, 10, 10)
    attend, rows = without_copies(varlen_reference, layout, Inputs(*drawn(layout)))
    assert len(rows.k) == 20 + 3 * 30
    torch.testing.assert_close(attend(*rows[:3]), dense(layout)(*drawn(layout)[:3]), rtol=1e-5, atol=1e-5)
