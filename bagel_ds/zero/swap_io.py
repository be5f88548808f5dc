"""Reads and writes of swap files for DeepSpeed's NVMe offload.

Guarantees: when `wait` returns, the kernel has confirmed every byte, or `wait` raises a `UserError` that names the
file; any address, length and sector size gives the right bytes. Data bypasses the page cache (O_DIRECT) if the file
system supports that. Replaces DeepSpeed's async_io op, which ignores the result of a request: there, a read into an
address that is not a multiple of the sector size moves nothing and counts as done (DeepSpeed 0.19.8, csrc/aio and
csrc/pin_memory). Needs neither libaio nor a compiler.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.units import GIB, MIB

logger = logging.getLogger("bagel_ds")

SECTOR = 4096  # bytes; drives have sectors of 512 or 4096, and a multiple of 4096 suits both
REQUEST = 8 * MIB  # bytes of one system call
BOUNCE = MIB  # bytes that one thread copies at a time if an address is not aligned
MOST_THREADS = 8


class SwapHandle:
    """Replaces `async_io.aio_handle` in DeepSpeed's swappers, with the same arguments.

    `queue_depth` is the number of requests in flight (at most 8, each of 8 MiB). The other arguments have no effect.
    """

    def __init__(
        self,
        block_size: int = MIB,
        queue_depth: int = MOST_THREADS,
        single_submit: bool = False,
        overlap_events: bool = True,
        intra_op_parallelism: int = 1,
    ):
        threads = max(1, min(queue_depth, MOST_THREADS))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="swap")
        self._pending: list[_Transfer] = []

    def async_pread(self, buffer: Tensor, path: str, file_offset: int = 0) -> int:
        """Begin to fill a contiguous CPU tensor from `path`; it must live until `wait`. Returns 0."""
        return self._begin(buffer, path, file_offset, write=False)

    def async_pwrite(self, buffer: Tensor, path: str, file_offset: int = 0) -> int:
        """Begin to write a contiguous CPU tensor to `path`; it must not change until `wait`. Returns 0."""
        return self._begin(buffer, path, file_offset, write=True)

    def wait(self) -> int:
        """Wait for all transfers begun since the last call; returns the number of tensors.

        Raises UserError if a file could not be read or written in full. All requests have ended by then.
        """
        pending, self._pending = self._pending, []
        faults = [fault for transfer in pending for fault in transfer.finish()]
        if faults:
            raise faults[0]
        return len(pending)

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        """A zeroed 1-D tensor of the example's dtype: see `locked_tensor`."""
        return locked_tensor(numel, example.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Whether this memory is from `locked_tensor`. It is freed with its last tensor."""
        return tensor.data_ptr() in _locked

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor is in page-locked memory, ours or torch's, so that DeepSpeed needs no copy of it."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        ours = any(start <= begin and end <= start + size for start, size in list(_locked.items()))
        return tensor.device.type == "cpu" and (ours or tensor.is_pinned())

    def _begin(self, buffer: Tensor, path: str, file_offset: int, write: bool) -> int:
        assert buffer.device.type == "cpu" and buffer.is_contiguous(), f"{path}: swapped tensors must be on the host"
        assert file_offset % SECTOR == 0, f"{path}: offset {file_offset} in the file is not a multiple of {SECTOR}"
        self._pending.append(_Transfer(self._pool, buffer, path, file_offset, write))
        return 0


class _Request(NamedTuple):
    """`nbytes` from `address` to `position` in the file, or back."""

    address: int
    position: int
    nbytes: int


class _Transfer:
    """One tensor in transit, cut into requests. Keeps the tensor and the file until all are done."""

    def __init__(self, pool: ThreadPoolExecutor, buffer: Tensor, path: str, position: int, write: bool):
        self._buffer, self._write = buffer, write
        self._file = _SwapFile(path, write)
        _say_if_copied(buffer, path)
        self._futures: list[Future[None]] = [
            pool.submit(self._file.move, request, write)
            for request in _requests(buffer.data_ptr(), position, buffer.nbytes)
        ]

    def finish(self) -> Iterator[UserError]:
        """Wait for the requests and close the file; yields their faults."""
        errors = [future.exception() for future in self._futures]
        self._file.close()
        for error in errors:
            if isinstance(error, OSError):
                yield _fault(self._file.path, self._buffer.nbytes, self._write, error)
            elif error is not None:
                raise error


def _requests(address: int, position: int, nbytes: int) -> Iterator[_Request]:
    for begin in range(0, nbytes, REQUEST):
        yield _Request(address + begin, position + begin, min(REQUEST, nbytes - begin))


class _SwapFile:
    """An open swap file, used by every thread of a handle. Each call gives its position."""

    def __init__(self, path: str, write: bool):
        self.path = path
        self._flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
        self._descriptor = -1
        self._fault: OSError | None = None
        self._lock = threading.Lock()
        self.direct = os.path.dirname(path) not in _without_direct
        try:
            self._descriptor = self._open()
        except OSError as error:
            self._fault = error  # raised by `move`, so that `wait` reports it with the file's name

    def _open(self) -> int:
        if self.direct:
            try:
                return os.open(self.path, self._flags | os.O_DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._give_up_direct()
        return os.open(self.path, self._flags, 0o600)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def move(self, request: _Request, write: bool) -> None:
        """Move all bytes of a request or raise OSError. O_DIRECT needs whole sectors at aligned addresses; all else is
        copied through a buffer of this thread."""
        if self._fault is not None:
            raise self._fault
        whole = request.nbytes - request.nbytes % SECTOR if request.address % SECTOR == 0 else 0
        if whole:
            self._exactly(_memory(request.address, whole), request.position, write, whole)
        for begin in range(whole, request.nbytes, BOUNCE):
            count = min(BOUNCE, request.nbytes - begin)
            self._move_copied(request.address + begin, request.position + begin, count, write)

    def _move_copied(self, address: int, position: int, nbytes: int, write: bool) -> None:
        buffer, start = _bounce_buffer()
        sectors = memoryview(buffer)[: -(-nbytes // SECTOR) * SECTOR]
        if write:
            ctypes.memmove(start, address, nbytes)
            self._exactly(sectors, position, write, len(sectors))
        else:
            self._exactly(sectors, position, write, nbytes)
            ctypes.memmove(address, start, nbytes)

    def _exactly(self, memory: memoryview, position: int, write: bool, needed: int) -> None:
        """Move at least `needed` bytes of `memory`; the kernel may move fewer per call."""
        done = 0
        while done < needed:
            moved = self._some(memory[done:], position + done, write)
            if moved <= 0:
                raise OSError(errno.EIO, f"{done:,} of {needed:,} bytes at {position:,} moved, then the file ended")
            done += moved

    def _some(self, memory: memoryview, position: int, write: bool) -> int:
        call = os.pwritev if write else os.preadv
        direct = self.direct  # for this call; another thread may give it up before the call fails
        try:
            return call(self._descriptor, [memory], position)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
        with self._lock:  # the descriptor keeps its number, because other threads may be using it
            if self.direct:
                plain = os.open(self.path, self._flags, 0o600)
                os.dup2(plain, self._descriptor)
                os.close(plain)
                self._give_up_direct()  # last, so that a call that sees this uses the plain file
        return call(self._descriptor, [memory], position)

    def _give_up_direct(self) -> None:
        self.direct = False
        folder = os.path.dirname(self.path)
        if folder not in _without_direct:
            _without_direct.add(folder)
            logger.warning(
                "NVMe: the file system of %s can't bypass the page cache (O_DIRECT), so swapping goes through it, "
                "which is slower; a folder on a local ext4 or xfs disk is faster",
                folder,
            )


def _fault(path: str, nbytes: int, write: bool, error: OSError) -> UserError:
    what = f"--nvme_path: {path} could not be {'written' if write else 'read'} ({nbytes:,} bytes): "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{what}{error.strerror}. Free space there, or pass another --nvme_path or a preset that keeps more in "
            "memory (zero3_cpu), and resume from the last checkpoint."
        )
    return UserError(
        f"{what}{error.strerror}. Training can't continue without these values. Check the drive (dmesg, smartctl), "
        "make sure that nothing else removes these files, and resume from the last checkpoint."
    )


def reserve_file(path: Path, nbytes: int, what: str) -> None:
    """Make a file of `nbytes` zeros and allocate its blocks, as a full disk would end writing to a mapping in SIGBUS.

    `what` it is for, in the message of the `UserError` if there is no room.
    """
    try:
        with path.open("wb") as file:
            if nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        raise UserError(
            f"--nvme_path: {path} can't hold {nbytes / GIB:.2f} GiB of {what} ({error.strerror}); free space there, "
            "or pass another --nvme_path or a preset that keeps more in memory (zero3_cpu)"
        ) from None


# ------------------------------------------------------------------------------------------------------------- memory
_locked: dict[int, int] = {}  # address -> size of page-locked memory
_without_direct: set[str] = set()  # folders whose file system refuses O_DIRECT
_said: set[str] = set()
_threads = threading.local()


def locked_tensor(numel: int, dtype: torch.dtype) -> Tensor:
    """A zeroed 1-D CPU tensor that begins at a page, locked in RAM if this process's limits allow that."""
    nbytes = max(1, numel * dtype.itemsize)
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError):  # kernels without huge pages, where each read or write pins many small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)
    address = _address(memory)
    if ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) != 0:
        _say_once(
            "NVMe: swap buffers can't be locked in memory (%s); raise `ulimit -l`, or the system may swap them out",
            os.strerror(ctypes.get_errno()),
        )
    _locked[address] = nbytes
    weakref.finalize(memory, _locked.pop, address, None)
    return tensor


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _bounce_buffer() -> tuple[mmap.mmap, int]:
    """This thread's aligned buffer of BOUNCE bytes, and its address."""
    if not hasattr(_threads, "buffer"):
        _threads.buffer = mmap.mmap(-1, BOUNCE)
        _threads.start = _address(_threads.buffer)
    return _threads.buffer, _threads.start


def _say_if_copied(buffer: Tensor, path: str) -> None:
    if buffer.nbytes >= MIB and buffer.data_ptr() % SECTOR:
        _say_once(
            "NVMe: %s and others are swapped through a copy, because their buffer does not begin at a multiple of "
            "4096 bytes; remove aio.intra_op_parallelism from the ds_config or set it to a multiple of 4",
            os.path.basename(path),
        )


def _say_once(message: str, *values: Any) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message, *values)
