"""How fast and how full the drives are that a run saves and swaps to, measured with files of the doctor's own.

Guarantees: the files are removed whatever happens; measuring takes a few seconds and at most 1 GiB per folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bagel_ds.doctor.environment import Finding, Verdict
from bagel_ds.errors import UserError
from bagel_ds.machine.user_folders import write_fault
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.nvme_check import check_drives, file_system, free_bytes

GB = 10**9  # drives and their makers count in these
# Of the 7B with all weights trained.
SWAPPED_BYTES = 176 * GB  # fp32 masters and Adam's two moments
CHECKPOINT_BYTES = SWAPPED_BYTES + (58 + 29 + 29) * GB  # the average in fp32; weights and average in bf16
_BLOCK = 64 * MIB
_MOST_BLOCKS = 16
_SECONDS = 3.0  # for writing; reading is not slower
_SLOW_SAVE = 0.2 * GB  # bytes per second; 24 minutes for the 7B
_SLOW_SWAP = 1.0 * GB  # the least that drives sold as NVMe reach


class Speed(NamedTuple):
    """Bytes per second."""

    write: float
    read: float

    def __str__(self) -> str:
        return f"writes {self.write / GB:.2f} GB/s, reads {self.read / GB:.2f} GB/s"


def save_findings(folder: Path, measured: bool) -> list[Finding]:
    """Whether checkpoints of the 7B fit into `folder`, and how long one takes."""
    if fault := write_fault(folder):
        return [Finding("checkpoint_dir", Verdict.FAULT, f"{folder} can't be written: {fault}", "pass another folder")]
    existing = _existing(folder)
    free, whole = shutil.disk_usage(existing).free, CHECKPOINT_BYTES
    said = f"{folder} ({file_system(existing)}) has {free / GB:.0f} GB free"
    remedy = ""
    if free < whole:
        remedy = (
            f"a checkpoint of the whole 7B takes {whole / GB:.0f} GB, of LoRA about 5 GB: free space, or use "
            "--keep_last and --del_previous_state"
        )
    findings = [Finding("checkpoint_dir", Verdict.NOTE if remedy else Verdict.GOOD, said, remedy)]
    if measured:
        findings.append(_judged("checkpoint_dir speed", existing, save_speed, _SLOW_SAVE, _save_time, "SSD"))
    return findings


def swap_findings(folder: Path, measured: bool) -> list[Finding]:
    """What a run checks of `--nvme_path`, and how fast the drive is when it is used as a run does."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        said = check_drives([folder])[0].removeprefix("NVMe: ")
        findings = [Finding("nvme_path", Verdict.GOOD, said)]
        if made:
            remedy = "if a drive should be mounted there, mount it, or correct the path"
            said = f"does not exist yet, and a run will make it: {said}"
            findings = [Finding("nvme_path", Verdict.NOTE, said, remedy)]
        if measured:
            findings.append(_judged("nvme_path speed", folder, swap_speed, _SLOW_SWAP, _swap_time, "NVMe SSD"))
        return findings
    except UserError as fault:
        return [Finding("nvme_path", Verdict.FAULT, str(fault).removeprefix("--nvme_path: "))]
    finally:
        with suppress(OSError):  # not empty, or could not be made
            for path in made:
                path.rmdir()


def save_speed(folder: Path) -> Speed:
    """As checkpoints are written: through the page cache, then flushed."""
    block, blocks = os.urandom(_BLOCK), 0
    with _own_file(folder) as path, path.open("wb+", buffering=0) as file:
        began = time.monotonic()
        while blocks < _MOST_BLOCKS and time.monotonic() - began < _SECONDS:
            file.write(block)
            blocks += 1
            os.fsync(file.fileno())
        written = time.monotonic() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.monotonic()
        while file.read(_BLOCK):
            pass
        return Speed(blocks * _BLOCK / written, blocks * _BLOCK / (time.monotonic() - began))


def swap_speed(folder: Path) -> Speed:
    """As training swaps: many requests at once that bypass the page cache, if the file system allows it."""
    import torch

    from bagel_ds.zero.swap_io import SwapHandle

    handle, block, blocks = SwapHandle(), torch.empty(_BLOCK, dtype=torch.uint8).random_(), 0
    with _own_file(folder) as path:
        began = time.monotonic()
        while blocks < _MOST_BLOCKS and time.monotonic() - began < _SECONDS:
            handle.async_pwrite(block, str(path), blocks * _BLOCK)
            handle.wait()
            blocks += 1
        with path.open("rb") as file:
            os.fsync(file.fileno())
            written = time.monotonic() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        for index in range(blocks):
            handle.async_pread(block, str(path), index * _BLOCK)
            handle.wait()
        return Speed(blocks * _BLOCK / written, blocks * _BLOCK / (time.monotonic() - began))


def _judged(
    name: str,
    folder: Path,
    measure: Callable[[Path], Speed],
    least: float,
    lasts: Callable[[Speed], str],
    wanted: str,
) -> Finding:
    if free_bytes(folder) < 2 * _BLOCK * _MOST_BLOCKS:
        return Finding(
            name, Verdict.NOTE, f"not measured: less than {2 * _BLOCK * _MOST_BLOCKS / GIB:.0f} GiB are free"
        )
    try:
        speed = measure(folder)
    except (OSError, UserError) as fault:
        return Finding(name, Verdict.FAULT, f"a file written for measuring failed: {fault}", "check this drive")
    said = f"{speed}: {lasts(speed)}"
    slow = min(speed) < least
    remedy = f"this is less than {least / GB:g} GB/s; use a local {wanted}"
    return Finding(name, Verdict.NOTE, said, remedy) if slow else Finding(name, Verdict.GOOD, said)


def _save_time(speed: Speed) -> str:
    minutes = CHECKPOINT_BYTES / speed.write / 60
    return f"a checkpoint of the whole 7B takes about {minutes:.0f} minutes, most of it while training goes on"


def _swap_time(speed: Speed) -> str:
    seconds = SWAPPED_BYTES / speed.write + SWAPPED_BYTES / speed.read
    return f"one update of the whole 7B moves its states through it in about {seconds:.0f} s"


@contextmanager
def _own_file(folder: Path) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix=".bagel_ds_speed_", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
