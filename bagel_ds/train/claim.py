"""One run at a time writes to a checkpoint_dir.

Guarantees: a run that finds another one still writing there (most often the one before it, which was told to stop and
saves its last step) waits for its end, and takes it for a mistake after ten minutes. The claim ends with the process
that holds it, however that ends. Where the file system has no locks there is no claim, and nothing is promised.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bagel_ds.errors import UserError

logger = logging.getLogger("bagel_ds")

FILE = ".in_use"
_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.5


@dataclass
class Claim:
    """Held until `release`, or until the process ends."""

    path: Path
    descriptor: int

    def release(self) -> None:
        with suppress(OSError):  # the lock is what counts, and the file of an ended run is taken over
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def claim(folder: Path, patience: float = _PATIENCE_SECONDS) -> Claim | None:
    """Wait for whoever writes to `folder`, then claim it; None where that can't be. Raises `UserError` in the end."""
    path = folder / FILE
    began, told = time.monotonic(), False
    while True:
        try:
            claimed = _try(path)
        except OSError as error:
            logger.info("%s can't be locked (%s): see to it that one run at a time uses it", folder, error.strerror)
            return None
        if claimed is not None:
            return claimed
        if time.monotonic() - began > patience:
            raise UserError(
                f"checkpoint_dir {folder} is in use by another run ({_holder(path)}). Stop that one (`bagel-ds stop "
                f"{folder}`), or pass another --checkpoint_dir."
            )
        if not told:
            logger.warning("checkpoint_dir %s is in use (%s): waiting for that run to end", folder, _holder(path))
            told = True
        time.sleep(_POLL_SECONDS)


def _try(path: Path) -> Claim | None:
    """The claim, or None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # Not flock: forked DataLoader workers would hold it on after the rank is killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        os.close(descriptor)  # held, or removed by its holder between opening and locking
        return None
    except OSError:
        os.close(descriptor)
        raise
    if not is_current:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return Claim(path, descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "its name is not written yet"
    except OSError:
        return "it is ending"
