"""Collects weights that are spread over ranks into one safetensors file, chunk by chunk.

Guarantees: beyond its own share no rank ever holds more than `CHUNK_BYTES`. The file holds the ranks' values cast to
its dtype, bit for bit (chunks are combined as bytes, so even a negative zero is kept). Every rank makes the same
collective calls.
"""

from __future__ import annotations

from typing import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.ranges import Pieces, Range, TensorInfo

CHUNK_BYTES = 2**26


def stream_tensors(
    writer: TensorFileWriter | None,
    tensors: Mapping[str, TensorInfo],
    pieces: Iterable[Pieces],
    device: torch.device,
) -> None:
    """Fill `writer` (on rank 0; None elsewhere). Call it on every rank, with the same names in the same order.

    `device` is the one that the process group communicates from. A write error is raised as OSError on rank 0 only,
    after all collective calls, so that no other rank waits.
    """
    missing = set(tensors)
    refused: OSError | None = None
    for name, ranges in pieces:
        info = tensors[name]
        missing.remove(name)
        step = CHUNK_BYTES // info.dtype.itemsize
        for start in range(0, info.numel, step):
            chunk = _gather(ranges, start, min(step, info.numel - start), info.dtype, device)
            if writer is not None and refused is None:
                try:
                    writer.write(name, start, chunk.cpu())
                except OSError as error:
                    refused = error
    assert not missing, f"no rank offered {sorted(missing)[:3]}"
    if refused is not None:
        raise refused


def _gather(
    ranges: list[tuple[Range, Tensor]], start: int, numel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Elements [start, start + numel) from the ranges of all ranks; complete on rank 0 only."""
    chunk = torch.zeros(numel, dtype=dtype, device=device)
    for held, values in ranges:
        low, high = max(held.start, start), min(held.start + held.numel, start + numel)
        if low < high:
            chunk[low - start : high - start] = values[low - held.start : high - held.start]
    if dist.get_world_size() > 1:
        # Each element is nonzero on at most one rank, so summing bytes combines the ranges exactly.
        dist.reduce(chunk.view(torch.uint8), 0)
    return chunk
