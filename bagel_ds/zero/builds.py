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
    """Remove the build locks of processes that are gone; returns them."""
    locks = [lock for folder in folders or extension_folders() for lock in folder.rglob("lock") if lock.is_file()]
    removed = []
    for lock in locks:
        if not is_open_somewhere(lock):
            lock.unlink(missing_ok=True)
            removed.append(lock)
            logger.warning("removed %s, left by a build that was killed", lock)
    return removed


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
