"""Buffers in shared memory go away when nobody uses them, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bagel_ds.zero.shm_buffers import remove_own_buffers, remove_stale_buffers

# Uses a buffer as a rank does: mapped, with or without the file still open (Python's own mmap keeps it open).
USER = """
import ctypes, os, sys
call = ctypes.CDLL(None, use_errno=True).mmap
call.restype = ctypes.c_void_p
call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
file = os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] != "opens":
    assert call(None, 4096, 3, 1, file, 0) != ctypes.c_void_p(-1).value
    os.close(file)
print("ready", flush=True)
sys.stdin.readline()
"""


def buffer(folder: Path, port: int, rank: int, user: int | None = None, age: float = 3600) -> Path:
    owner = os.getuid() if user is None else user
    path = folder / f"deepspeed_allreduce_buffer_{owner}_127.0.0.1_{port}_{rank}"
    path.write_bytes(bytes(4096))
    modified = path.stat().st_mtime - age
    os.utime(path, (modified, modified))
    return path


@pytest.mark.parametrize("way", ["opens", "maps"])
def test_a_buffer_in_use_stays_and_is_removed_once_its_process_is_gone(tmp_path: Path, way: str) -> None:
    used, left = buffer(tmp_path, 29500, 0), buffer(tmp_path, 29501, 0)
    command = [sys.executable, "-c", USER, str(used), way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert remove_stale_buffers(tmp_path) == [left]
        assert used.exists()
        process.kill()
    assert remove_stale_buffers(tmp_path) == [used]
    assert list(tmp_path.iterdir()) == []


def test_young_buffers_those_of_others_and_other_files_stay(tmp_path: Path) -> None:
    buffer(tmp_path, 29500, 0, age=0)
    buffer(tmp_path, 29500, 1, user=os.getuid() + 1)
    (tmp_path / "sem.other").touch()
    mine = tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_notes.txt"
    mine.touch()
    os.utime(mine, (0, 0))
    assert remove_stale_buffers(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 4


def test_a_run_removes_the_buffers_of_its_own_meeting_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "2950")
    own = [buffer(tmp_path, 2950, rank, age=0) for rank in (0, 1)]
    other = buffer(tmp_path, 29501, 0, age=0)
    remove_own_buffers(tmp_path)
    assert list(tmp_path.iterdir()) == [other] and own
