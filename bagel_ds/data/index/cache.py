"""Where an index lives between runs: one file per data file, beside the data or in a cache folder.

Guarantees: an entry is complete or absent (written under a temporary name, then renamed) and is only used for the same
file (path, size, modification time), tokenizer and source version; one process at a time indexes into a folder, others
wait for it with a message. A folder that cannot be written costs the cache, not the run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bagel_ds.data.files import filesystems
from bagel_ds.data.index.data_file import FileLayout
from bagel_ds.machine import user_folders
from bagel_ds.machine.liveness import going_on
from bagel_ds.machine.waiting import waiting_for

logger = logging.getLogger("bagel_ds")

Part = TypeVar("Part")

BESIDE_DATA = ".bagel_ds_index"
_FORMAT = 2  # of an entry
_ABANDONED_SECONDS = 3600.0  # an entry is written within seconds
_TEMPORARY = re.compile(r".+-[0-9a-f]{20}\.safetensors\.\d+\.tmp")  # an entry's name and a process
_ASK_SECONDS = 0.1  # between two looks at a lock that another process holds


class FileRecords(NamedTuple):
    """What one data file holds, row by row.

    numbers: int32, all rows' records end to end; offsets: int64 [rows + 1] into it (an unusable row is empty); bad:
    (row, reason), row -1 for the file as a whole.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    bad: tuple[tuple[int, str], ...]


class Entry(NamedTuple):
    """A kept index, its records still on disk."""

    layout: FileLayout
    bad: tuple[tuple[int, str], ...]
    identity: str  # the file's, when it was indexed


def cache_folder(path: str, cache_dir: str | None) -> Path | None:
    """Where the index of `path` is kept: `cache_dir`, else beside the data, else ~/.cache/bagel_ds, else nowhere."""
    home = user_folders.cache_folder() / "bagel_ds"
    beside = [] if filesystems.is_uri(path) else [Path(path).parent / BESIDE_DATA]
    for folder in [Path(cache_dir)] if cache_dir else [*beside, home]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    logger.warning("the index of %s cannot be kept (no writable cache folder); it is made anew in every run", path)
    return None


def cache_file(folder: Path, path: str, key: str) -> Path:
    """Name of the entry for `path`; `key` is everything but the file that the index depends on."""
    place = path if filesystems.is_uri(path) else os.path.abspath(path)
    name = hashlib.sha256(f"{place}\n{key} {_FORMAT}".encode()).hexdigest()[:20]
    return folder / f"{Path(path.partition('?')[0]).stem[:80]}-{name}.safetensors"


def identity(path: str) -> str:
    """Changes whenever the file does."""
    _, size, modified = filesystems.version(path, fresh=True)
    return f"{size}:{modified}"


def size_of(path: str) -> int:
    """Bytes of a data file."""
    return filesystems.version(path)[1]


def load(entry: Path, path: str) -> Entry | None:
    """The kept index of `path`, or None when there is none or the file has changed since."""
    return _read(entry, path, _entry)


def load_records(entry: Path, path: str) -> FileRecords | None:
    """The records that belong to `load`'s layout, or None as there."""
    return _read(entry, path, _records)


def _read(entry: Path, path: str, part: Callable[[str, Any, dict[str, Any]], Part]) -> Part | None:
    if not entry.is_file():
        return None
    try:
        with safe_open(entry, framework="np") as file:
            header = json.loads(file.metadata()["index"])
            if header["identity"] != identity(path):
                return None
            return part(path, file, header)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None  # a damaged entry is made again


def _entry(path: str, file: Any, header: dict[str, Any]) -> Entry:
    arrays = {name: file.get_tensor(name) for name in ("unit_rows", "places")}
    layout = FileLayout(path, **arrays, columns=tuple(header["columns"]), digest=header["digest"])
    return Entry(layout, _bad(header), header["identity"])


def _records(path: str, file: Any, header: dict[str, Any]) -> FileRecords:
    return FileRecords(file.get_tensor("numbers"), file.get_tensor("offsets"), _bad(header))


def _bad(header: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    return tuple((row, reason) for row, reason in header["bad"])


def save(entry: Path, layout: FileLayout, records: FileRecords, identity_before: str) -> bool:
    """Keep an index; `identity_before` is the file's identity from before it was read. Whether it could be kept."""
    header = {
        "identity": identity_before,
        "bad": records.bad,
        "columns": layout.columns,
        "digest": layout.digest,
    }
    arrays = {
        "numbers": records.numbers,
        "offsets": records.offsets,
        "unit_rows": layout.unit_rows,
        "places": layout.places,
    }
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, {"index": json.dumps(header)})
        os.replace(temporary, entry)
    except (OSError, SafetensorError) as error:
        logger.warning("the index of %s could not be kept in %s: %s", layout.path, entry.parent, error)
        temporary.unlink(missing_ok=True)
        return False
    return True


def sweep(folders: Iterable[Path]) -> None:
    """Remove what killed processes have left half written: files of the names that `save` gives, and no others."""
    for folder in folders:
        for path in folder.glob("*.tmp"):
            try:
                old = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
                if old and _TEMPORARY.fullmatch(path.name) and path.is_file():
                    path.unlink()
            except OSError:  # another host was faster
                continue


@contextmanager
def locked(folders: Iterable[Path], name: str = "", until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold every folder's lock of that name; locks end with the process, so a killed run leaves none behind.

    `until` is asked while another process holds one: once it says yes, nobody's lock is waited for any longer.
    """
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            try:
                _lock(stack.enter_context(open(folder / f".lock{name}", "w")), folder, until)
            except OSError:  # a file system without locks: two processes may do the same work, nothing worse
                continue
        yield


def _lock(file: IO[str], folder: Path, until: Callable[[], bool]) -> None:
    if until() or _try_lock(file):
        return
    logger.info("another process is indexing into %s; waiting for it", folder)
    with waiting_for(f"the process that indexes into {folder}", "its files are not indexed a second time"):
        while not (until() or _try_lock(file)):
            going_on()  # the other one does, or it would end
            time.sleep(_ASK_SECONDS)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
