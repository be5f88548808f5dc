"""The mask that FlexAttention is given, and its kernel on a CPU, where it has a forward pass only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from bagel_ds.model.attention import flex
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import CAUSAL, FULL, NOISE
from tests.model.attention.structures import Structure, cached_lens, dense, drawn, layouts, query_rows, samples

CPU = torch.device("cpu")


def longer(structure: Structure, times: int) -> Structure:
    """So long that splits end within blocks, at their edges and several to a block."""
    return [[(length * times, mode) for length, mode in sample] for sample in structure]


@given(samples, st.data(), st.sampled_from([1, 43, 64]))
def test_bounds_are_the_rule_and_blocks_hold_all_of_it(structure: Structure, data: st.DataObject, times: int) -> None:
    for layout in layouts(longer(structure, times), data.draw(cached_lens(structure, 200))):
        tokens = flex.bounds(layout, CPU)
        reach, segment, last = tokens
        sees = (torch.arange(len(last)) <= reach[:, None]) & (segment[:, None] <= last)
        expected = torch.zeros_like(sees)
        rows = query_rows(layout)
        expected[: len(rows), : sum(layout.segment_lens)] = layout.dense_mask()[rows]
        assert torch.equal(sees, expected)  # padding sees nothing and is not seen

        mask = flex.block_mask(tokens)
        table = sees.unflatten(1, (-1, flex.BLOCK)).unflatten(0, (-1, flex.BLOCK))  # [R, block, B, block]
        some, all_of_it = table.any(3).any(1), table.all(3).all(1)
        partial, full = torch.zeros_like(some), torch.zeros_like(some)
        for row in range(len(some)):
            partial[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = True
            assert mask.full_kv_indices is not None and mask.full_kv_num_blocks is not None
            full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
        assert torch.equal(full, all_of_it) and not bool((partial & full).any())
        assert bool((partial | full)[some].all())


def test_few_blocks_are_computed_for_nothing() -> None:
    layout = AttentionLayout.from_splits(
        [3000, 2500], [300, 1000, 700, 200, 800, 2500], [CAUSAL, NOISE, FULL, CAUSAL, NOISE, CAUSAL]
    )
    reach, segment, last = flex.bounds(layout, CPU)
    sees = (torch.arange(len(last)) <= reach[:, None]) & (segment[:, None] <= last)
    needed = sees.unflatten(1, (-1, flex.BLOCK)).unflatten(0, (-1, flex.BLOCK)).any(3).any(1).sum()
    mask = flex.block_mask(flex.bounds(layout, CPU))
    assert mask.full_kv_num_blocks is not None
    computed = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    assert needed <= computed <= 1.05 * needed


def test_lengths_are_padded_to_four_sizes_per_power_of_two() -> None:
    sizes = {flex.padded_length(tokens) for tokens in range(1, 65537)}
    assert all(size % flex.BLOCK == 0 for size in sizes) and len(sizes) <= 4 * 9
    assert all(
        tokens <= flex.padded_length(tokens) <= max(flex.BLOCK + tokens, 1.25 * tokens) for tokens in range(1, 65537)
    )
    assert flex.padded_length(36864) == 40960 and flex.padded_length(1) == 128


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's plain form of the same function, without a compiler and with a backward pass."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_kernel", lambda: torch_flex.flex_attention)


@pytest.mark.parametrize("times", [1, 30])
def test_it_equals_a_dense_mask(times: int, eager: None) -> None:
    structure = longer([[(3, CAUSAL), (4, NOISE), (2, FULL), (4, CAUSAL)], [(2, NOISE), (1, CAUSAL)]], times)
    for layout in layouts(structure, [5, 0]):
        q, k, v, _ = drawn(layout, head_dim=16)
        found = flex.prepare(layout)(q, k, v)
        torch.testing.assert_close(found, dense(layout)(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports
def test_the_compiled_kernel_is_exact_and_compiled_once_for_many_packs() -> None:
    """Half a minute of C++ compiler. fp32, forward only; a trial agreed to 7e-7."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    packs = [
        ([300, 200], [60, 100, 40, 100, 150, 50], [CAUSAL, NOISE, FULL, CAUSAL, FULL, NOISE]),
        ([490], [100, 300, 90], [CAUSAL, FULL, NOISE]),
        ([400, 50], [400, 50], [CAUSAL, FULL]),
    ]
    with torch.no_grad():
        for splits in packs:
            layout = AttentionLayout.from_splits(*splits)
            q, k, v, _ = drawn(layout, head_dim=16)
            torch.testing.assert_close(flex.prepare(layout)(q, k, v), dense(layout)(q, k, v), rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
