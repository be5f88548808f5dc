"""What is replaced in DeepSpeed's NVMe swapping (0.19.8): its reads and writes, and three methods around them.

Guarantees: swap files are read and written through `SwapHandle`; no element of a gradient is lost, and no whole
gradient stays on the device; no weight is read after its buffer was given to another; write buffers are large enough
for every group.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Callable

from torch import Tensor

from bagel_ds.zero.swap_io import SECTOR, SwapHandle, locked_tensor


def use_checked_swapping() -> None:
    """Make every NVMe swapper that DeepSpeed creates in this process from now on use `SwapHandle`."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero import partition_parameters

    OpBuilder._loaded_ops["async_io"] = SimpleNamespace(aio_handle=SwapHandle)
    OpBuilder._loaded_ops["pin_memory"] = SimpleNamespace()  # compiled for async_io, which is replaced
    OptimizerSwapper._adjust_for_misaligned_lengths = _cut_gradients
    AsyncPartitionedParameterSwapper.reserve_partitioned_swap_space = _reserve_swap_space
    if not hasattr(partition_parameters._no_gather_coalesced, "copies_swapped"):
        partition_parameters._no_gather_coalesced = _copying_swapped(partition_parameters._no_gather_coalesced)


def _cut_gradients(swapper: Any, tensors: list[Tensor], offsets: list[int]) -> tuple[list[Tensor], list[int]]:
    """Cut gradients so that what is swapped begins and ends at whole sectors of the group's buffer.

    `offsets` are elements in that buffer. The rest, less than a sector at each end, stays in memory, as do pieces too
    small to be swapped. DeepSpeed's own method leaves the beginning unaligned and keeps small pieces as views, which
    keep whole gradients alive on the device.
    """
    cut: list[Tensor] = []
    places: list[int] = []
    for tensor, offset in zip(tensors, offsets):
        if not swapper.is_swappable_tensor(tensor=tensor):
            cut.append(tensor.cpu())
            places.append(offset)
            continue
        step = SECTOR // tensor.element_size()
        begin, end = -offset % step, tensor.numel() - (offset + tensor.numel()) % step
        for first, last in ((0, begin), (begin, end), (end, tensor.numel())):
            if first < last:
                piece = tensor.narrow(0, first, last - first)
                cut.append(piece if swapper.is_swappable_tensor(tensor=piece) else piece.to("cpu", copy=True))
                places.append(offset + first)
    return cut, places


def _copying_swapped(gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`gather`, which gives a single rank its whole parameters, with copies of those that are in a swap buffer.

    Under activation checkpointing autograd keeps a weight's memory until the backward pass of its layer is done. On a
    CPU a single rank's weight would be the swap buffer itself, which by then holds another parameter.
    """

    def gather_and_copy(parameters: Any) -> Any:
        parameters = list(parameters)
        handle = gather(parameters)
        for parameter in parameters:
            held = parameter.ds_tensor
            if getattr(held.final_location, "value", None) == "nvme" and parameter.data_ptr() == held.data_ptr():
                parameter.data = parameter.data.clone()
        return handle

    gather_and_copy.copies_swapped = True  # type: ignore[attr-defined]
    return gather_and_copy


def _reserve_swap_space(swapper: Any, partition_num_elems: list[int]) -> None:
    """Make the buffer through which updated parameters of one group go to NVMe.

    DeepSpeed sizes it for the group with the most elements. But each swapped parameter is padded to `numel_alignment`,
    so a group with fewer elements in more parameters can need more. Each of these has at least `min_aio_bytes`, which
    bounds their number.
    """
    from deepspeed.runtime.swap_tensor.utils import SwapBufferPool

    numel = sum(swapper._io_aligned_numel(count) for count in partition_num_elems)
    padded = numel * swapper.swap_element_size // swapper.min_aio_bytes + 1
    room = swapper._io_aligned_numel(numel) + padded * swapper.numel_alignment
    buffer = locked_tensor(room, swapper.dtype)
    swapper.partitioned_swap_buffer = buffer
    swapper.partitioned_swap_pool = SwapBufferPool([buffer], aio_handle=swapper.aio_write_handle)
