"""A lock, so that one run at a time writes to a checkpoint_dir.

Guarantees: a run that finds another one still writing there (usually the previous one, which is saving its last step)
waits for it, for up to ten minutes. The lock ends with the process that holds it, however that ends. A file system
without locks gets a log line and no protection.
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
from typing import NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.machine.liveness import going_on
from bagel_ds.machine.waiting import waiting_for

logger = logging.getLogger("bagel_ds")

FILE = ".in_use"
_POINTER = ".checkpoint_dir"  # in a results_dir
_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.5


@dataclass
class Claim:
    """Held until `release`, or until the process ends."""

    path: Path
    descriptor: int

    def release(self) -> None:
        with suppress(OSError):  # the lock counts; a later run takes the file over
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def claim(folder: Path, patience: float = _PATIENCE_SECONDS) -> Claim | None:
    """Wait for a run that uses `folder`, then claim it; None without locks. Raises `UserError` after `patience` s."""
    path = folder / FILE
    try:
        claimed = _try(path)
        if claimed is None:
            logger.warning("checkpoint_dir %s is in use (%s): waiting for that run to end", folder, _holder(path))
            with waiting_for(lambda: f"the run that uses {folder} ({_holder(path)})", "for up to ten minutes"):
                claimed = _wait_and_try(path, patience)
    except OSError as error:
        logger.info("%s can't be locked (%s): make sure that one run at a time uses it", folder, error.strerror)
        return None
    if claimed is None:
        raise UserError(
            f"checkpoint_dir {folder} is in use by another run ({_holder(path)}). Stop that one (`bagel-ds stop "
            f"{folder}`), or pass another --checkpoint_dir."
        )
    return claimed


def _wait_and_try(path: Path, patience: float) -> Claim | None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        going_on()
        time.sleep(_POLL_SECONDS)
        if (claimed := _try(path)) is not None:
            return claimed
    return None


class RunFound(NamedTuple):
    """A run that uses a folder, as far as this host can tell; `sure` if the lock is held."""

    sure: bool
    what: str


def remember(results_dir: Path, checkpoint_dir: Path) -> None:
    """Let `find_run` find the run by its results_dir as well."""
    with suppress(OSError):  # only `bagel-ds stop` needs it, and takes the checkpoint_dir as well
        (results_dir / _POINTER).write_text(f"{checkpoint_dir.resolve()}\n")


def find_run(folder: Path) -> RunFound | None:
    """The run with this results_dir or checkpoint_dir, or None. Don't call it in that run's process."""
    found = _found(folder / FILE)
    try:
        claimed = Path((folder / _POINTER).read_text().strip())
    except FileNotFoundError:
        return found
    except (OSError, ValueError) as error:
        return found or RunFound(False, f"{folder / _POINTER} can't be read: {error}")
    if not claimed.is_dir():
        return found or RunFound(False, f"its checkpoint_dir {claimed} can't be seen from here")
    return found or _found(claimed / FILE)


def _found(path: Path) -> RunFound | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        return RunFound(False, f"{path} can't be read: {error.strerror}")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return RunFound(True, _holder(path))
    except OSError as error:
        return RunFound(False, f"{path} can't be locked: {error.strerror}")
    finally:
        os.close(descriptor)
    holder = _holder(path)
    if holder.endswith(f" on {socket.gethostname()}"):
        return None  # that process has ended without removing its file
    return RunFound(False, f"locks don't show whether it still runs: {holder}")


def _try(path: Path) -> Claim | None:
    """The claim, or None if another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # Not flock: a forked process would keep it after this one is killed.
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
