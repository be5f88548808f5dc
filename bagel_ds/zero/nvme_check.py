"""The drive that a run swaps to: can it be written, is it a drive at all, and does it have the space?

Guarantees: a drive that can't work is one `UserError` with the folder and the remedy, before training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bagel_ds.errors import UserError, all_faults
from bagel_ds.units import GIB, MIB

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs", "overlay-tmpfs")


def check_drives(folders: Sequence[Path]) -> list[str]:
    """Make the folders. Raise `UserError` unless each can be written and is on a drive. Returns lines for the log."""
    notes, faults = [], []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".bagel_ds_probe_{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            faults.append(f"--nvme_path: {folder} can't be written ({error.strerror}); pass a folder on a local SSD")
            continue
        kind = file_system(folder)
        if kind in MEMORY_FILE_SYSTEMS:
            faults.append(f"--nvme_path: {folder} is on a {kind}, which is memory; pass a folder on a local SSD")
        notes.append(f"NVMe: {folder} ({kind}), {_size(free_bytes(folder))} free")
    all_faults(faults, "Offload to NVMe can't work:")
    return notes


def check_space(folders: Sequence[Path], needed: int) -> None:
    """Raise `UserError` unless `needed` bytes are free for each folder: what all ranks of this host swap."""
    for folder in folders:
        if (free := free_bytes(folder)) < needed:
            raise UserError(
                f"--nvme_path: {folder} has {_size(free)} free, this run needs {_size(needed)}; free space there, "
                "or pass another --nvme_path or a preset that keeps more in memory (zero3_cpu)"
            )


def free_bytes(folder: Path) -> int:
    """On the folder's drive."""
    return shutil.disk_usage(folder).free


def file_system(path: Path) -> str:
    """Type of the file system of `path`, as the kernel names it."""
    best, kind = "", "unknown"
    resolved = str(path.resolve())
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, mount, name = line.split()[:3]
        mount = mount.replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind


def _size(count: int) -> str:
    return f"{count / GIB:.0f} GiB" if count >= 10 * GIB else f"{count / MIB:.0f} MiB"
