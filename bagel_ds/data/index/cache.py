"""Where an index lives between runs: one file per data file, beside the data or in a cache folder.

Guarantees: an entry is complete or absent (written under a temporary name, then renamed) and is used only for the same
file (path, size, modification time), tokenizer and format version. Its arrays are mapped, not copied. One process at a
time indexes into a folder; others wait for it with a message. Where no folder can be written a run works without.
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
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from bagel_ds.data.files import filesystems
from bagel_ds.data.index.data_file import FileLayout
from bagel_ds.data.index.records import BadRows, FileRecords, folder_time
from bagel_ds.machine import user_folders
from bagel_ds.machine.liveness import going_on
from bagel_ds.machine.waiting import waiting_for

logger = logging.getLogger("bagel_ds")

BESIDE_DATA = ".bagel_ds_index"
_FORMAT = 3  # of an entry; part of its name, so that other versions never read it
_STEM_BYTES = 80  # of the data file's name that an entry's begins with
_LENGTH_BYTES = 8  # of a safetensors file: the header's length
_DTYPES = {"I32": np.int32, "I64": np.int64, "U8": np.uint8}
_ABANDONED_SECONDS = 3600.0  # an entry is written within seconds
_TEMPORARY = re.compile(r".*-[0-9a-f]{20}\.safetensors\.\d+\.tmp", re.DOTALL)  # an entry's name and a process
_ASK_SECONDS = 0.1  # between two attempts to take a lock


class Entry(NamedTuple):
    """A kept index; its arrays are mapped, so the processes of a host share their pages."""

    layout: FileLayout
    records: FileRecords
    identity: str  # the file's, when it was indexed

    def is_current(self) -> bool:
        """Whether no folder that holds a file named by a row has changed since: a file may be new or replaced."""
        return all(folder_time(folder) == time for folder, time in self.records.folders.items())


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
    logger.warning("no folder is writable for the index of %s; every run makes it again", filesystems.shown(path))
    return None


def cache_file(folder: Path, path: str, key: str) -> Path:
    """Name of the entry for `path`; `key` is everything that the index depends on, except the file."""
    place = path if filesystems.is_uri(path) else os.path.abspath(path)
    name = hashlib.sha256(f"{place}\n{key} {_FORMAT}".encode("utf-8", "surrogateescape")).hexdigest()[:20]
    # A file system counts bytes: a Chinese character takes three of the 255 that a name may have.
    stem = os.fsencode(Path(path.partition("?")[0]).stem)[:_STEM_BYTES].decode("utf-8", "ignore")
    return folder / f"{stem}-{name}.safetensors"


def identity(path: str) -> str:
    """Changes whenever the file does. Raises OSError."""
    _, size, modified = filesystems.version(path, fresh=True)
    return f"{size}:{modified}"


def load(entry: Path, path: str) -> Entry | None:
    """The kept index of `path`, or None when there is none, it is damaged, or the file has changed since."""
    try:
        arrays, header = _mapped(entry)
        if header["identity"] != identity(path):
            return None
        layout = FileLayout(path, arrays["unit_rows"], arrays["places"], tuple(header["columns"]), header["digest"])
        bad = BadRows(arrays["bad_rows"], arrays["bad_offsets"], arrays["bad_text"])
        folders = json.loads(arrays["folders"].tobytes())
        records = FileRecords(arrays["numbers"], arrays["offsets"], bad, arrays["stamps"], folders)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        return None  # and made again
    is_whole = records.rows == layout.rows and int(records.offsets[-1]) == len(records.numbers)
    return Entry(layout, records, header["identity"]) if is_whole else None


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a safetensors file, and our header. Raises OSError, ValueError, KeyError and TypeError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > size - _LENGTH_BYTES:
            raise ValueError("cut off")
        header = json.loads(file.read(length))
        # torch's mapping, because python's keeps a file descriptor; by the number, because it takes UTF-8 names only.
        place = f"/proc/self/fd/{file.fileno()}"
        content = torch.from_file(place, shared=False, size=size, dtype=torch.uint8).numpy()
    content.flags.writeable = False
    ours = json.loads(header.pop("__metadata__")["index"])
    start = _LENGTH_BYTES + length
    arrays = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        arrays[name] = content[start + begin : start + end].view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return arrays, ours


def save(entry: Path, layout: FileLayout, records: FileRecords, identity_before: str) -> bool:
    """Keep an index; `identity_before` is the file's identity from before it was read. Whether it could be kept."""
    header = {"identity": identity_before, "columns": layout.columns, "digest": layout.digest}
    arrays = {
        "numbers": records.numbers,
        "offsets": records.offsets,
        "stamps": records.stamps,
        "bad_rows": records.bad.rows,
        "bad_offsets": records.bad.offsets,
        "bad_text": records.bad.text,  # not in the header, which is limited to 100 MB
        "folders": np.frombuffer(json.dumps(records.folders).encode(), np.uint8),
        "unit_rows": layout.unit_rows,
        "places": layout.places,
    }
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, {"index": json.dumps(header)})
        os.replace(temporary, entry)  # a process that has mapped the old one keeps it
    except (OSError, SafetensorError) as error:
        names = map(filesystems.shown, (layout.path, str(entry.parent)))
        logger.warning("the index of %s could not be kept in %s: %s", *names, error)
        temporary.unlink(missing_ok=True)
        return False
    return True


def sweep(folders: Iterable[Path]) -> None:
    """Remove files that killed processes left half written: only names that `save` gives."""
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
    """Hold each folder's lock of that name; the kernel releases the locks of a killed process.

    While another process holds a lock, waiting ends as soon as `until` returns True.
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
    place = filesystems.shown(str(folder))
    logger.info("another process is indexing into %s; waiting for it", place)
    with waiting_for(f"the process that indexes into {place}", "its files are not indexed a second time"):
        while not (until() or _try_lock(file)):
            going_on()  # the other process works, or its lock would be free
            time.sleep(_ASK_SECONDS)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
