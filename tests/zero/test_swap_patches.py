"""DeepSpeed's swappers use our handle, and gradients are cut so that whole sectors are swapped."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bagel_ds.zero.swap_io import SECTOR, SwapHandle
from bagel_ds.zero.swap_patches import _cut_gradients, use_checked_swapping

STEP = SECTOR // 4  # fp32 elements of a sector
MIB_ELEMENTS = 2**20 // 4


def swapper() -> Any:
    return SimpleNamespace(is_swappable_tensor=lambda tensor: tensor.numel() >= MIB_ELEMENTS)


@pytest.mark.parametrize("offset", [0, 1, 64, 128, STEP - 1, STEP, STEP + 1])
@pytest.mark.parametrize(
    "count", [1, STEP - 1, MIB_ELEMENTS - 1, MIB_ELEMENTS, MIB_ELEMENTS + 1, MIB_ELEMENTS + STEP + 3]
)
def test_gradients_are_cut_so_that_what_is_swapped_fills_whole_sectors(offset: int, count: int) -> None:
    gradient = torch.arange(count).float()
    pieces, places = _cut_gradients(swapper(), [gradient, gradient], [offset, offset + count])
    whole = torch.full((2 * count + offset,), -1.0)
    swapped = 0
    for piece, place in zip(pieces, places):
        assert (whole[place : place + piece.numel()] == -1).all(), "no two pieces overlap"
        whole[place : place + piece.numel()] = piece
        if piece.numel() >= MIB_ELEMENTS:
            assert place % STEP == 0 and piece.numel() % STEP == 0
            swapped += piece.numel()
        elif piece.numel() < count:
            assert piece.untyped_storage().nbytes() == piece.nbytes, "a small piece does not keep the gradient alive"
    assert torch.equal(whole[offset:], gradient.repeat(2)) and (whole[:offset] == -1).all()
    if count >= MIB_ELEMENTS + 2 * STEP:
        assert swapped > 0


def test_deepspeed_finds_our_handle_where_there_is_no_cuda_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own op for a GPU joins CUDA_HOME, which is None with torch from pip, after saying that all is well.

    Nor does it compile an op for pinned memory, whose lock a killed build would leave to all later runs.
    """
    import torch.utils.cpp_extension
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero import partition_parameters

    for owner, name in (
        (OptimizerSwapper, "_adjust_for_misaligned_lengths"),
        (AsyncPartitionedParameterSwapper, "reserve_partitioned_swap_space"),
        (partition_parameters, "_no_gather_coalesced"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(OpBuilder, "jit_load", lambda *_, **__: pytest.fail("an op is compiled"))
    monkeypatch.setattr(sys, "_deepspeed_pin_memory_op_module", None, raising=False)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.delenv("DS_BUILD_AIO", raising=False)
    use_checked_swapping()
    assert AsyncIOBuilder().load().aio_handle is SwapHandle
    gather = partition_parameters._no_gather_coalesced
    use_checked_swapping()
    assert partition_parameters._no_gather_coalesced is gather, "a second engine wraps nothing twice"
