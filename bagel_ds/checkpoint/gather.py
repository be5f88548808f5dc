"""Weights that are spread over ranks -> one safetensors file, a chunk at a time.

Guarantees: no rank ever holds more than `CHUNK_BYTES` of it besides its own share; the file's bits are those of the
pieces cast to the file's dtype (chunks are combined as bytes, so not even a negative zero changes); every rank makes
the same collective calls.
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
    """Fill `writer` (rank 0's; None elsewhere); call on every rank, with the same names in the same order.

    `device` is where the ranks' process group communicates from. What the disk refuses is raised on rank 0, as OSError,
    once all ranks have made all of their calls: the others know nothing of it.
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
    """Elements [start, start + numel) from all ranks' pieces; complete on rank 0 only."""
    chunk = torch.zeros(numel, dtype=dtype, device=device)
    for held, values in ranges:
        low, high = max(held.start, start), min(held.start + held.numel, start + numel)
        if low < high:
            chunk[low - start : high - start] = values[low - held.start : high - held.start]
    if dist.get_world_size() > 1:
        # Each element is nonzero on at most one rank, so a sum of bytes puts the pieces together exactly.
        dist.reduce(chunk.view(torch.uint8), 0)
    return chunk
