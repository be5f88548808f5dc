"""Folders of swap files below --nvme_path: one per run and host, locked while ranks run, removed however they end.

Guarantees: every rank holds the lock of its host's folder, and the kernel releases it however the rank ends. The last
rank to leave removes the folder. The next run removes folders that no running rank holds (those of a killed run, say)
and leaves all others alone. This needs the locks of a local disk: hosts that share one --nvme_path over a network are
kept apart only by their names.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import time
import uuid
from pathlib import Path

from bagel_ds.errors import UserError
from bagel_ds.machine.liveness import going_on
from bagel_ds.machine.waiting import waiting_for

logger = logging.getLogger("bagel_ds")

_PREFIX, _LOCK = "bagel_ds_", ".in_use"
_OURS = re.compile(rf"{_PREFIX}([0-9a-f]{{12}}|gone_[0-9a-f]{{32}})")
_PATIENCE_SECONDS = 30.0  # for ranks of an earlier start that are about to end
_POLL_SECONDS = 0.1
_held: dict[Path, int] = {}  # descriptors of this process's locks, by folder; the kernel, too, has them per process


def run_folder(nvme_path: Path, checkpoint_dir: str) -> Path:
    """This run's folder on this host: the same for all of its ranks, but not for other runs or containers."""
    run = f"{Path(checkpoint_dir).resolve()} {socket.gethostname()}"
    return nvme_path / (_PREFIX + hashlib.sha256(run.encode()).hexdigest()[:12])


def is_run_folder(folder: Path) -> bool:
    """Whether the folder's name comes from `run_folder`, also if the folder is being removed."""
    return _OURS.fullmatch(folder.name) is not None


def take_folder(folder: Path, first: bool, patience: float = _PATIENCE_SECONDS) -> None:
    """Hold `folder` until `leave_folders` or the end of the process. The `first` rank of a host makes and empties it.

    Call it on the first rank before the others. Raises `UserError` if another run holds it or it can't be written.
    """
    deadline = time.monotonic() + patience
    try:
        with waiting_for(lambda: f"the run that uses {folder} ({_holder(folder)})", "it seems to be ending"):
            while (descriptor := _make_and_lock(folder, first)) is None:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--nvme_path: {folder} is in use by another run ({_holder(folder)}), which has the same "
                        "checkpoint_dir and host name; end that run, or pass another --nvme_path or --checkpoint_dir"
                    )
                going_on()
                time.sleep(_POLL_SECONDS)
        if first:
            _empty(folder)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            fcntl.lockf(descriptor, fcntl.LOCK_SH)  # exclusive becomes shared, without a gap
    except OSError as error:
        raise UserError(
            f"--nvme_path: {folder} can't be written ({error.strerror}); pass a folder on a local SSD"
        ) from None
    _held[folder] = descriptor


def _make_and_lock(folder: Path, first: bool) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    return _locked(folder, fcntl.LOCK_EX if first else fcntl.LOCK_SH)


def leave_folders() -> None:
    """Release what this process holds. The last rank of the host to do so removes the files."""
    while _held:
        folder, descriptor = _held.popitem()
        os.close(descriptor)
        _remove_unheld(folder)


def sweep_folders(nvme_path: str | None) -> list[Path]:
    """Remove the folders below --nvme_path that no running rank holds, and return them. Call it while holding none."""
    assert not _held, "closing a second descriptor of a locked file would release the lock"
    if nvme_path is None:
        return []
    folders = sorted(filter(is_run_folder, Path(nvme_path).glob(f"{_PREFIX}*")))
    removed = [folder for folder in folders if not folder.is_symlink() and _remove_unheld(folder)]
    for folder in removed:
        logger.info("removed %s, left by a run that has ended", folder)
    return removed


def _remove_unheld(folder: Path) -> bool:
    """Remove `folder` unless a running rank holds it, it is another user's, or it is gone; whether it was removed."""
    try:
        descriptor = _locked(folder, fcntl.LOCK_EX)
    except OSError:
        return False
    if descriptor is None:
        return False
    # Rename first, so that a concurrent re-creation survives.
    going = folder.with_name(f"{_PREFIX}gone_{uuid.uuid4().hex}")
    try:
        folder.rename(going)
    except OSError:  # a mount point
        going = folder
    shutil.rmtree(going, ignore_errors=True)
    os.close(descriptor)
    return True


def _locked(folder: Path, kind: int) -> int | None:
    """A descriptor that holds the folder's lock; None if others hold it or the folder is gone."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        # Not flock, whose lock a forked process would keep after the rank is killed.
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != _LOCK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _holder(folder: Path) -> str:
    try:
        return (folder / _LOCK).read_text().strip() or "which has not written its name yet"
    except OSError:
        return "which is ending"
