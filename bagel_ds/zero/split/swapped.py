"""What split masters keep beside the weights, in files on NVMe: one for each group, read and written at each update.

Guarantees: what was written is what is read, or a `UserError` names the file. While one group is updated, the next is
read and the one before is written, so three buffers of the largest group are all that is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bagel_ds.zero.config.settings import SPLIT_SWAP_BUFFERS
from bagel_ds.zero.swap_io import SECTOR, SwapHandle, locked_tensor, reserve_file


class SwappedGroups:
    """Tensors of the same dtypes for every group, `sizes` elements each (1-D), zeros at first."""

    def __init__(self, folder: Path, sizes: Sequence[int], dtypes: Sequence[torch.dtype]):
        self._sizes, self._dtypes = sizes, dtypes
        self._paths = [folder / f"group_{index}.split" for index in range(len(sizes))]
        folder.mkdir(parents=True, exist_ok=True)
        for path, size in zip(self._paths, sizes):
            reserve_file(path, self._ends(size)[-1], "the optimizer's states")
        largest = self._ends(max(sizes))[-1]
        self._buffers = [_Buffer(largest) for _ in range(min(SPLIT_SWAP_BUFFERS, len(sizes)))]

    @contextmanager
    def open(self, group: int, write: bool, ahead: bool = False) -> Iterator[tuple[Tensor, ...]]:
        """The group's tensors, not to be used afterwards, and to be changed only with `write`.

        With `ahead`, the group after it begins to be read.
        """
        buffer = self._read(group)
        buffer.finish()
        if ahead and group + 1 < len(self._sizes) and len(self._buffers) > 1:
            self._read(group + 1)
        try:
            yield self._views(buffer.memory, self._sizes[group])
        except BaseException:
            buffer.holds = None
            raise
        if write:
            buffer.handle.async_pwrite(self._used(buffer, group), str(self._paths[group]))

    def flush(self) -> None:
        """Wait until everything is in the files."""
        for buffer in self._buffers:
            buffer.finish()

    def _read(self, group: int) -> _Buffer:
        """Begin to read a group, unless its buffer holds it or it is already on its way."""
        buffer = self._buffers[group % len(self._buffers)]
        if buffer.holds != group:
            buffer.finish()  # what it held may still be being written
            buffer.holds = group
            buffer.handle.async_pread(self._used(buffer, group), str(self._paths[group]))
        return buffer

    def _used(self, buffer: _Buffer, group: int) -> Tensor:
        return buffer.memory[: self._ends(self._sizes[group])[-1]]

    def _ends(self, size: int) -> list[int]:
        """Byte offsets at which the tensors of a group end; each begins at a whole sector."""
        ends, start = [], 0
        for dtype in self._dtypes:
            ends.append(start + size * dtype.itemsize)
            start = -(-ends[-1] // SECTOR) * SECTOR
        return ends

    def _views(self, memory: Tensor, size: int) -> tuple[Tensor, ...]:
        return tuple(
            memory[end - size * dtype.itemsize : end].view(dtype) for dtype, end in zip(self._dtypes, self._ends(size))
        )


class _Buffer:
    def __init__(self, nbytes: int):
        self.memory = locked_tensor(nbytes, torch.uint8)
        self.handle = SwapHandle()
        self.holds: int | None = None  # the group whose values are in it, or are being read

    def finish(self) -> None:
        """Wait for what is being read or written. A buffer whose transfer failed holds nothing."""
        try:
            self.handle.wait()
        except BaseException:
            self.holds = None
            raise
