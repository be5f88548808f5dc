"""Swap files hold what was written and are read where they should be, or the run stops: at every size and alignment.

Thresholds, each tested on both sides: SECTOR (4096 bytes) for addresses and lengths, BOUNCE (1 MiB) for what is copied
at a time, REQUEST (8 MiB) for one system call, MOST_THREADS for requests in flight.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.zero import swap_io
from bagel_ds.zero.swap_io import BOUNCE, MOST_THREADS, REQUEST, SECTOR, SwapHandle, locked_tensor

LENGTHS = [1, 3, SECTOR - 1, SECTOR, SECTOR + 1, BOUNCE - 1, BOUNCE, BOUNCE + 1, REQUEST - 1, REQUEST, REQUEST + 1]
LENGTHS += [2 * REQUEST + BOUNCE + SECTOR + 7, (MOST_THREADS + 1) * REQUEST]
OFFSETS = [0, 1, 64, 256, 511, 512, 2048, SECTOR - 1, SECTOR, SECTOR + 1]


@pytest.fixture(scope="module")
def handle() -> SwapHandle:
    return SwapHandle()


@pytest.fixture(scope="module")
def room() -> Tensor:
    return locked_tensor((MOST_THREADS + 2) * REQUEST, torch.uint8)


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_io, "_without_direct", set())
    monkeypatch.setattr(swap_io, "_said", set())


def some_bytes(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_written_is_read_at_every_alignment(
    tmp_path: Path, handle: SwapHandle, room: Tensor, length: int
) -> None:
    content, path = some_bytes(length), str(tmp_path / "a.swp")
    for offset in OFFSETS if length <= REQUEST + 1 else OFFSETS[:3]:
        source = room.narrow(0, offset, length).copy_(content)
        assert (handle.async_pwrite(source, path), handle.wait()) == (0, 1)
        room.zero_()
        other = (offset + 100) % SECTOR
        target = room.narrow(0, other, length)
        assert (handle.async_pread(target, path), handle.wait()) == (0, 1)
        assert torch.equal(target, content), f"written from offset {offset}, read to offset {other}"
        assert not room[other - 8 : other].any() and not room[other + length :][:8].any(), "nothing beside it changed"


def test_memory_that_is_not_ours_and_any_dtype_can_be_swapped(tmp_path: Path, handle: SwapHandle) -> None:
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.int64)):
        content = torch.arange(300_001).to(dtype)
        handle.async_pwrite(content, str(tmp_path / f"{number}.swp"))
        assert handle.wait() == 1
        target = torch.empty_like(content)
        handle.async_pread(target, str(tmp_path / f"{number}.swp"))
        assert handle.wait() == 1 and torch.equal(target, content)


def test_many_transfers_are_counted_together(tmp_path: Path, handle: SwapHandle) -> None:
    tensors = [torch.full((100_000,), float(i)) for i in range(40)]
    for i, tensor in enumerate(tensors):
        handle.async_pwrite(tensor, str(tmp_path / f"{i}.swp"))
    assert handle.wait() == 40 and handle.wait() == 0
    found = [torch.empty(100_000) for _ in tensors]
    for i, tensor in enumerate(found):
        handle.async_pread(tensor, str(tmp_path / f"{i}.swp"))
    assert handle.wait() == 40 and all(torch.equal(*pair) for pair in zip(tensors, found))


# ----------------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize("kept", [0, SECTOR, REQUEST, REQUEST + SECTOR])
def test_a_file_that_lost_bytes_stops_the_run(tmp_path: Path, handle: SwapHandle, kept: int) -> None:
    path = tmp_path / "a.swp"
    handle.async_pwrite(some_bytes(REQUEST + 2 * SECTOR), str(path))
    handle.wait()
    os.truncate(path, kept)
    handle.async_pread(torch.empty(REQUEST + 2 * SECTOR, dtype=torch.uint8), str(path))
    with pytest.raises(UserError, match=r"a\.swp could not be read .* the file ended.*last checkpoint"):
        handle.wait()
    assert handle.wait() == 0, "the fault has been reported"


def test_a_missing_file_or_folder_stops_the_run(tmp_path: Path, handle: SwapHandle) -> None:
    handle.async_pread(torch.empty(8), str(tmp_path / "none.swp"))
    with pytest.raises(UserError, match="none.swp could not be read.*No such file"):
        handle.wait()
    handle.async_pwrite(torch.empty(8), str(tmp_path / "gone" / "none.swp"))
    with pytest.raises(UserError, match="none.swp could not be written.*No such file"):
        handle.wait()


def test_one_fault_among_many_transfers_is_found(tmp_path: Path, handle: SwapHandle) -> None:
    for i in range(8):
        handle.async_pwrite(torch.ones(1000), str(tmp_path / ("gone" if i == 5 else "") / f"{i}.swp"))
    with pytest.raises(UserError, match=r"5\.swp"):
        handle.wait()


def test_a_full_disk_is_named_with_its_remedies(
    tmp_path: Path, handle: SwapHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, buffers: Any, position: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    handle.async_pwrite(torch.ones(2**20), str(tmp_path / "a.swp"))
    with pytest.raises(UserError, match="No space left on device. Free space there"):
        handle.wait()


def test_a_write_that_the_system_cuts_short_stops_the_run(tmp_path: Path, handle: SwapHandle) -> None:
    """A real limit: the first write stops there, the rest fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BOUNCE, before[1]))
    try:
        handle.async_pwrite(some_bytes(2 * BOUNCE), str(tmp_path / "a.swp"))
        with pytest.raises(UserError, match="File too large"):
            handle.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_transfers_that_move_nothing_and_report_no_error_stop_the_run(
    tmp_path: Path, handle: SwapHandle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = str(tmp_path / "a.swp")
    handle.async_pwrite(some_bytes(BOUNCE), path)
    handle.wait()
    monkeypatch.setattr(os, name, lambda *_: 0)
    begin = handle.async_pread if name == "preadv" else handle.async_pwrite
    begin(some_bytes(BOUNCE), path)
    with pytest.raises(UserError, match="0 of 1,048,576 bytes at 0 moved"):
        handle.wait()


def test_transfers_in_small_steps_are_completed(
    tmp_path: Path, handle: SwapHandle, room: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda fd, buffers, at, real=real: real(fd, [memoryview(buffers[0])[: 3 * SECTOR]], at)
        )
    for offset in (0, 12):
        content = some_bytes(BOUNCE + 5)
        handle.async_pwrite(room.narrow(0, offset, len(content)).copy_(content), str(tmp_path / "a.swp"))
        handle.wait()
        room.zero_()
        handle.async_pread(room.narrow(0, offset, len(content)), str(tmp_path / "a.swp"))
        assert handle.wait() == 1 and torch.equal(room.narrow(0, offset, len(content)), content)


# ---------------------------------------------------------------------------------------- file systems without O_DIRECT
def test_a_call_that_fails_after_another_gave_up_direct_access_is_made_again(
    tmp_path: Path, handle: SwapHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests of one file are refused; the second learns so when the first has been made again."""
    import fcntl

    refused, both, real_write = iter(range(2)), threading.Barrier(2), os.pwritev

    def checked(descriptor: int, *arguments: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and (number := next(refused, None)) is not None:
            both.wait(60)
            while number == 1 and str(tmp_path) not in swap_io._without_direct:
                time.sleep(0.01)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_write(descriptor, *arguments)

    monkeypatch.setattr(os, "pwritev", checked)
    content = some_bytes(2 * REQUEST)
    handle.async_pwrite(content, str(tmp_path / "a.swp"))
    assert handle.wait() == 1
    assert (tmp_path / "a.swp").read_bytes()[: 2 * REQUEST] == bytes(content.numpy())
    assert next(refused, None) is None, "both were refused"


@pytest.mark.parametrize("refused", ["open", "transfer"])
def test_without_direct_access_swapping_goes_on_and_says_so_once(
    tmp_path: Path, handle: SwapHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    import fcntl

    real_open, real_write, real_read = os.open, os.pwritev, os.preadv

    def opened(path: str, flags: int, *more: int) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *more)

    def checked(real: Any) -> Any:
        def call(descriptor: int, *arguments: Any) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, *arguments)

        return call

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwritev", checked(real_write))
    monkeypatch.setattr(os, "preadv", checked(real_read))
    content = some_bytes(3 * REQUEST + 17)
    for name in ("a.swp", "b.swp"):
        handle.async_pwrite(content, str(tmp_path / name))
        assert handle.wait() == 1
        target = torch.empty_like(content)
        handle.async_pread(target, str(tmp_path / name))
        assert handle.wait() == 1 and torch.equal(target, content)
    assert sum("O_DIRECT" in record.getMessage() for record in caplog.records) == 1


# -------------------------------------------------------------------------------------------------------------- memory
def test_buffers_begin_at_a_page_and_are_known_while_they_live(handle: SwapHandle) -> None:
    buffer = handle.new_cpu_locked_tensor(10_000, torch.zeros(1, dtype=torch.bfloat16))
    assert buffer.dtype == torch.bfloat16 and buffer.numel() == 10_000 and not buffer.any()
    assert buffer.data_ptr() % SECTOR == 0
    assert handle.is_pinned(buffer) and handle.is_pinned(buffer[5000:]) and handle.free_cpu_locked_tensor(buffer)
    assert not handle.is_pinned(torch.zeros(10_000)) and not handle.free_cpu_locked_tensor(buffer[1:])
    address = buffer.data_ptr()
    del buffer
    gc.collect()
    assert address not in swap_io._locked


def test_memory_that_cannot_be_locked_is_used_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Library:
        def mlock(self, *_: Any) -> int:
            return -1

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO", logger="bagel_ds"):
        patch.setattr(swap_io.ctypes, "CDLL", lambda *_, **__: Library())
        assert not locked_tensor(5, torch.float32).any()
        assert not locked_tensor(0, torch.float32).any()
    assert sum("ulimit -l" in record.getMessage() for record in caplog.records) == 1
