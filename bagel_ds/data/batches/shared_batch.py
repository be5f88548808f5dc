"""Sending a batch from a worker: its tensors lie in memory that both processes map, and are copied once.

Guarantees: the memory has no name, so no file system limits it (Docker keeps /dev/shm at 64 MiB). It is freed with the
last tensor in it, or with the last process that maps it.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagel_ds.model.batch import PackedBatch

_ALIGNMENT = 64  # bytes, that of torch's own allocations


class _Place(NamedTuple):
    """Where a tensor lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SentBatch(NamedTuple):
    """A batch with places instead of tensors, and how many bytes of memory come with it."""

    places: PackedBatch
    size: int


class ReceivedBatch(NamedTuple):
    """A batch as received; `batch` maps it."""

    sent: SentBatch
    descriptor: int

    def batch(self) -> PackedBatch:
        """The batch, whose tensors keep the memory."""
        try:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            memory = mmap.mmap(self.descriptor, self.sent.size, flags=flags) if self.sent.size else None
        finally:
            os.close(self.descriptor)

        def found(place: _Place) -> Tensor:
            count = torch.Size(place.shape).numel()
            if memory is None or not count:
                return torch.empty(place.shape, dtype=place.dtype)
            return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)

        return self.sent.places.map(found)


def send_batch(connection: Connection, batch: PackedBatch) -> None:
    """Send a batch whose tensors are on the CPU."""
    tensors: list[Tensor] = []
    size = 0

    def placed(tensor: Tensor) -> _Place:
        nonlocal size
        tensors.append(tensor)
        place = _Place(size, tuple(tensor.shape), tensor.dtype)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return place

    places = batch.map(placed)
    descriptor = os.memfd_create("bagel_ds_batch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        offset = 0
        for tensor in tensors:
            _write(descriptor, tensor.contiguous(), offset)
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        connection.send(SentBatch(places, size))
        send_handle(connection, descriptor, None)
    finally:
        os.close(descriptor)


def receive_batch(connection: Connection) -> Any:
    """What the other side sent: a `ReceivedBatch`, or any other object."""
    found = connection.recv()
    return ReceivedBatch(found, recv_handle(connection)) if isinstance(found, SentBatch) else found


def _write(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Write instead of mapping: a lack of memory is then an error rather than a signal."""
    content = memoryview(tensor.numpy().reshape(-1).view("uint8").data)
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
