"""DeepSpeed's compiled parts: keep a killed build from stopping every later run.

Guarantees: a lock that no running process holds is removed with a line; a lock that one holds is left alone. torch
waits for such a lock without end and without a word.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("bagel_ds")


def extension_folders() -> list[Path]:
    """Where DeepSpeed and torch compile to."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = [Path(named)] if named else [Path("/tmp/torch_extensions"), Path.home() / ".cache" / "torch_extensions"]
    return [folder for folder in folders if folder.is_dir()]


def remove_stale_locks(folders: list[Path] | None = None) -> list[Path]:
    """Remove the locks that killed builds of DeepSpeed's parts have left; returns them. Others' builds are not ours."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    removed = []
    for lock in (lock for folder in folders or extension_folders() for lock in _locks(folder)):
        # torch's lock is an empty file in the folder of the part, which is named after it.
        if lock.parent.name not in ALL_OPS or not lock.is_file() or is_open_somewhere(lock):
            continue
        try:
            if lock.stat().st_size == 0:
                lock.unlink()
                removed.append(lock)
                logger.warning("removed %s, left by a build that was killed", lock)
        except FileNotFoundError:  # another rank was faster
            continue
        except OSError as error:
            logger.warning("%s, left by a build that was killed, can't be removed: %s", lock, error.strerror)
    return removed


def _locks(folder: Path) -> list[Path]:
    """Where torch puts them: <folder>/<part>/lock, or <folder>/<python and CUDA>/<part>/lock."""
    return sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")])


def is_open_somewhere(path: Path) -> bool:
    """Whether a process of this host has the file open (a builder holds its lock open), or it is gone already."""
    try:
        target = os.stat(path)
    except FileNotFoundError:  # another rank was faster
        return True
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = os.stat(entry)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (target.st_dev, target.st_ino):
            return True
    return False
