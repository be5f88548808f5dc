"""Collects weights that are spread over ranks into one safetensors file on rank 0, frame by frame.

Guarantees: beyond its own share no rank holds more than four chunks of `CHUNK_BYTES`. The file holds the ranks' values
cast to its dtype, bit for bit. It works in a thread beside training, because it uses a gloo group of its own; `close`
ends it at once, whatever other ranks do. A rank that fails keeps no other waiting.

Each rank sends its values to rank 0, point to point, so nobody waits for anybody but rank 0, and nothing is summed.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Iterable, Iterator, Mapping, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.ranges import Pieces, TensorInfo

CHUNK_BYTES = 2**24  # of values in a frame, at most
_LEAST_BYTES = 2**16
_FRAMES_PER_RANK = 16  # at least, of a large file, so that the last one, which is rarely full, is a small part
_RANGES = 1024  # in a frame, at most
_HEAD_BYTES = 8 * 3 * (1 + _RANGES)
# A slow disk on rank 0 makes the others wait. The stall watch ends what hangs; gloo must not. It counts in 31 bits.
_PATIENCE = timedelta(days=24)
_CLOSING = 1  # the tag of a message that is never sent
_MORE, _LAST, _FAILED = 0, 1, 2  # what follows a frame: more, nothing, or nothing because its rank has failed


class Gathering:
    """Make it on every rank at the same time. `device` is the one that holds what is collected, or part of it."""

    def __init__(self, device: torch.device):
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)
        self._group, self._pins = group, device.type == "cuda"
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._closed = False

    def collect(
        self, writer: TensorFileWriter | None, tensors: Mapping[str, TensorInfo], pieces: Iterable[Pieces]
    ) -> None:
        """Fill `writer` (on rank 0; None elsewhere) with all ranks' `pieces`. Call it on every rank, from any thread.

        A write error is raised on rank 0 only, and an error of `pieces` on its rank only, once no rank waits for it.
        Raises RuntimeError if the connection to another rank breaks, or on `close`.
        """
        assert not self._closed, "closed"
        size = self._chunk_bytes(tensors)
        frames = _packed(tensors, pieces, [_Frame(size, self._pins) for _ in range(2)])
        if self._rank == 0:
            self._write(writer, tensors, frames, size)
        else:
            self._send(frames, size)

    def close(self) -> None:
        """End a `collect` that waits for another rank, here and there, with RuntimeError. There can't be another.

        gloo has no call for this, but a call of it that times out closes all connections of its group.
        """
        self._closed = True
        for rank in range(self._ranks):
            if rank != self._rank:
                with suppress(RuntimeError):
                    self._receive(torch.empty(1), rank, _CLOSING).wait(timedelta(milliseconds=1))

    def _chunk_bytes(self, tensors: Mapping[str, TensorInfo]) -> int:
        """The same on all ranks, because gloo's messages have a fixed size."""
        share = sum(info.nbytes for info in tensors.values()) // self._ranks
        size = min(CHUNK_BYTES, max(_LEAST_BYTES, share // _FRAMES_PER_RANK))
        return -(-size // 8) * 8

    def _write(
        self, writer: TensorFileWriter | None, tensors: Mapping[str, TensorInfo], own: Iterator[_Frame], size: int
    ) -> None:
        assert writer is not None
        refused: OSError | None = None
        failed, lacking = False, {name: info.numel for name, info in tensors.items()}
        for frames in (own, self._received(size)):
            for frame in frames:
                failed |= frame.follows == _FAILED
                for name, start, values in frame.ranges(tensors):
                    lacking[name] -= values.numel()
                    if refused is None:
                        try:
                            writer.write(name, start, values)
                        except OSError as error:
                            refused = error  # go on receiving, because the others wait until their frames are taken
        if refused is not None:
            raise refused
        # A rank that has failed reports why.
        wrong = [name for name, numel in lacking.items() if numel]
        assert failed or not wrong, f"not offered once: {wrong[:3]}"

    def _received(self, size: int) -> Iterator[_Frame]:
        """The frames of the other ranks, one of each in turn; valid until the next, which arrives meanwhile."""
        frames = deque(_Frame(size) for _ in range(2))
        waiting = deque(range(1, self._ranks))

        def ask() -> tuple[int, _Frame, dist.Work] | None:
            if not waiting:
                return None
            source, frame = waiting.popleft(), frames[0]
            frames.rotate()
            return source, frame, self._receive(frame.bytes, source)

        asked = ask()
        while asked is not None:
            source, frame, work = asked
            work.wait()
            if frame.follows == _MORE:
                waiting.append(source)
            asked = ask()
            yield frame

    def _send(self, frames: Iterable[_Frame], size: int) -> None:
        """Send frames to rank 0; one travels while the next is packed."""
        sending: dist.Work | None = None
        try:
            for frame in frames:
                before, sending = sending, dist.isend(frame.bytes, 0, group=self._group)
                if before is not None:
                    before.wait()
        except BaseException:
            with suppress(RuntimeError):
                dist.send(_Frame(size).closed(_FAILED).bytes, 0, group=self._group)
            raise
        assert sending is not None
        sending.wait()

    def _receive(self, target: Tensor, source: int, tag: int = 0) -> dist.Work:
        work = dist.irecv(target, source, group=self._group, tag=tag)
        assert work is not None
        return work


class _Row(NamedTuple):
    """A line of a frame's table: elements [start, start + numel) of the tensor with this number."""

    tensor: int
    start: int
    numel: int


class _Frame:
    """A message: values of some ranges, and before them a table that says which.

    The table's first line is the number of ranges and what follows the frame.
    """

    def __init__(self, size: int, pinned: bool = False):
        # Page-locked because CUDA copies to pageable memory in steps that delay other work.
        self.bytes = torch.empty(_HEAD_BYTES + size, dtype=torch.uint8, pin_memory=pinned)
        self._table = self.bytes[:_HEAD_BYTES].view(torch.int64).view(-1, len(_Row._fields))
        self._values = self.bytes[_HEAD_BYTES:]
        self.clear()

    def clear(self) -> None:
        self._rows: list[_Row] = []
        self._used = 0

    def add(self, tensor: int, start: int, values: Tensor, offset: int, dtype: torch.dtype) -> int:
        """Add as much of values[offset:], which begin at element `start` of a tensor, as has room; how much."""
        room = (len(self._values) - self._used) // dtype.itemsize
        numel = min(room, values.numel() - offset) if len(self._rows) < _RANGES else 0
        if numel:
            stop = self._used + numel * dtype.itemsize
            part = values[offset : offset + numel]
            # Cast there, so that less moves from a GPU; torch would cast afterwards.
            self._values[self._used : stop].view(dtype).copy_(part.to(dtype) if part.is_cuda else part)
            self._rows.append(_Row(tensor, start, numel))
            self._used = -(-stop // 8) * 8
        return numel

    def closed(self, follows: int) -> _Frame:
        """This frame with its table written."""
        self._table[: 1 + len(self._rows)] = torch.tensor([(len(self._rows), follows, 0), *self._rows])
        return self

    @property
    def follows(self) -> int:
        return int(self._table[0, 1])

    def ranges(self, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int, Tensor]]:
        """Name, first element and values of each range."""
        names, at = list(tensors), 0
        for number, start, numel in self._table[1 : 1 + int(self._table[0, 0])].tolist():
            stop = at + numel * tensors[names[number]].dtype.itemsize
            yield names[number], start, self._values[at:stop].view(tensors[names[number]].dtype)
            at = -(-stop // 8) * 8


def _packed(tensors: Mapping[str, TensorInfo], pieces: Iterable[Pieces], frames: list[_Frame]) -> Iterator[_Frame]:
    """`pieces` in frames, of which `frames` are used in turn. At least one; the last says so."""
    numbers = {name: number for number, name in enumerate(tensors)}
    turn = 0
    for name, ranges in pieces:
        for held, values in ranges:
            done = 0
            while done < held.numel:
                frame = frames[turn % len(frames)]
                added = frame.add(numbers[name], held.start + done, values, done, tensors[name].dtype)
                done += added
                if not added:
                    yield frame.closed(_MORE)
                    turn += 1
                    frames[turn % len(frames)].clear()
    yield frames[turn % len(frames)].closed(_LAST)
