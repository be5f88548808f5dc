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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bagel_ds.data import filesystems

logger = logging.getLogger("bagel_ds")

BESIDE_DATA = ".bagel_ds_index"


@dataclass(frozen=True)
class FileIndex:
    """What one data file holds, row by row.

    numbers: int32, all rows' records end to end; offsets: int64 [rows + 1] into it (an unusable row is empty);
    unit_rows: int64 [units], rows of each parquet row group or slice of lines; places: int64 [rows, 3], offset, length
    and number of each jsonl line, [0, 3] for parquet; bad: (row, reason), row -1 for the file as a whole.
    """

    path: str
    numbers: np.ndarray
    offsets: np.ndarray
    unit_rows: np.ndarray
    places: np.ndarray
    bad: tuple[tuple[int, str], ...]
    columns: tuple[str, ...] = ()
    digest: str = ""  # of everything above but the folder; equal on every host that holds the same data

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1


def cache_folder(path: str, cache_dir: str | None) -> Path | None:
    """Where the index of `path` is kept: `cache_dir`, else beside the data, else ~/.cache/bagel_ds, else nowhere."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bagel_ds"
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
    name = hashlib.sha256(f"{place}\n{key}".encode()).hexdigest()[:20]
    return folder / f"{Path(path.partition('?')[0]).stem[:80]}-{name}.safetensors"


def identity(path: str) -> str:
    """Changes whenever the file does."""
    _, size, modified = filesystems.version(path, fresh=True)
    return f"{size}:{modified}"


def size_of(path: str) -> int:
    """Bytes of a data file."""
    return filesystems.version(path)[1]


def load(entry: Path, path: str) -> FileIndex | None:
    """The kept index of `path`, or None when there is none or the file has changed since."""
    if not entry.is_file():
        return None
    try:
        with safe_open(entry, framework="np") as file:
            header = json.loads(file.metadata()["index"])
            if header["identity"] != identity(path):
                return None
            arrays = {name: file.get_tensor(name) for name in ("numbers", "offsets", "unit_rows", "places")}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None  # a damaged entry is made again
    bad = tuple((row, reason) for row, reason in header["bad"])
    return FileIndex(path, **arrays, bad=bad, columns=tuple(header["columns"]), digest=header["digest"])


def save(entry: Path, index: FileIndex, identity_before: str) -> None:
    """Keep `index`; `identity_before` is the file's identity from before it was read."""
    header = {"identity": identity_before, "bad": index.bad, "columns": index.columns, "digest": index.digest}
    arrays = {name: getattr(index, name) for name in ("numbers", "offsets", "unit_rows", "places")}
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, {"index": json.dumps(header)})
        os.replace(temporary, entry)
    except (OSError, SafetensorError) as error:
        logger.warning("the index of %s could not be kept in %s: %s", index.path, entry.parent, error)
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folders: Iterable[Path], name: str = "") -> Iterator[None]:
    """Hold every folder's lock of that name; locks end with the process, so a killed run leaves none behind."""
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            try:
                file = stack.enter_context(open(folder / f".lock{name}", "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("another process is indexing into %s; waiting for it", folder)
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: two processes may do the same work, nothing worse
                continue
        yield
