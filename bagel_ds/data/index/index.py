"""The index: what each row will cost, from one pass over the files that reads headers and decodes no picture.

Guarantees: for every row the token length of each text that could be used and the size of each image, or the reason why
the row cannot be used; a bad row never raises. `DataIndex` knows from the start where the rows of every file lie
(`data_file.py`); what they hold comes file by file from the cache (`cache.py`) or is made when it is first needed, so
that work can begin before all files are indexed. A file is indexed again when it changes; of a jsonl file beside whose
rows pictures were added or replaced, only those rows are.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bagel_ds.data.files.filesystems import shown, version
from bagel_ds.data.index import cache
from bagel_ds.data.index.data_file import DataFile, FileLayout, ReadTask, layout_of, read_tasks
from bagel_ds.data.index.progress import RowProgress
from bagel_ds.data.index.records import (
    NONE_BAD,
    BadRows,
    Chunk,
    FileRecords,
    TaskIndexer,
    differing,
    file_is_bad,
    joined,
)
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tokenizer import Tokenizer
from bagel_ds.processes import in_order

logger = logging.getLogger("bagel_ds")

__all__ = ["DataFile", "DataIndex", "FileIndex", "index_files"]

_POOL_ROWS = 20_000  # below this, starting processes costs more than it saves
_THREADS = 16  # that wait for file systems, mainly remote ones


class FileIndex:
    """One data file: its `layout` from the start, its `records` when they are first asked for.

    `entry` is where the cache keeps it, None for nowhere; `identity` the file's when `layout` was read.
    """

    def __init__(
        self, file: DataFile, layout: FileLayout, entry: Path | None, identity: str, fetch: Callable[[], None]
    ) -> None:
        self.file, self.layout, self.entry, self.identity = file, layout, entry, identity
        self.is_kept = False  # in the cache
        self.outdated: FileRecords | None = None  # from before files that rows name have changed
        self._records: FileRecords | None = None
        self._fetch = fetch

    @property
    def path(self) -> str:
        return self.layout.path

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def digest(self) -> str:
        return self.layout.digest

    @property
    def is_indexed(self) -> bool:
        return self._records is not None

    @property
    def records(self) -> FileRecords:
        """Indexes the file where it is not indexed yet. Raises `UserError` where it has changed meanwhile."""
        if self._records is None:
            self._fetch()
        assert self._records is not None
        return self._records

    @property
    def bad(self) -> BadRows:
        """What cannot be used; empty until the file is indexed."""
        return NONE_BAD if self._records is None else self._records.bad

    def load(self) -> bool:
        """Take records that another process kept meanwhile; whether the file is indexed."""
        if not self.is_indexed and self.entry is not None and (kept := cache.load(self.entry, self.path)) is not None:
            if kept.layout.digest != self.layout.digest:
                raise _changed(self.path)
            if self.outdated is None or kept.records.folders != self.outdated.folders:
                self._records, self.is_kept = kept.records, True
        return self.is_indexed

    def set(self, records: FileRecords) -> None:
        """Take new records, and keep them in the cache where there is one."""
        self._records, self.outdated, self.is_kept = records, None, False
        if self.entry is not None and not self.layout.error:
            self.is_kept = cache.save(self.entry, self.layout, records, self.identity)
            if self.is_kept and (kept := cache.load(self.entry, self.path)) is not None:
                self._records = kept.records  # mapped: processes share the memory

    def repair(self, chunks: Sequence[Chunk]) -> list[int]:
        """Replace the records by those that all rows' `TaskIndexer`s give now, where they differ, also in the cache.

        Returns the rows that differed. Raises `UserError` where the data file itself changed since it was opened.
        """
        if self.layout.error:
            return []
        if _identity(self.file) != self.identity:
            raise _changed(self.path)
        found = joined(chunks)
        rows = differing(self.records, found)
        if rows or found.folders != self.records.folders:
            self.set(found)
        return rows


class DataIndex:
    """The index of a run's files, in `indexes`."""

    def __init__(
        self,
        data_files: Iterable[DataFile],
        tokenizer: Tokenizer,
        cache_dir: str | None = None,
        progress: bool = False,
        workers: int | None = None,
    ) -> None:
        self._tokenizer, self._progress, self._workers = tokenizer, progress, workers
        wanted = list(dict.fromkeys(data_files))
        parents = {file.path.rpartition("/")[0]: file.path for file in wanted}
        folders = {parent: cache.cache_folder(path, cache_dir) for parent, path in parents.items()}

        def opened(file: DataFile) -> FileIndex:
            folder = folders[file.path.rpartition("/")[0]]
            key = f"{file.key} {tokenizer.fingerprint}"
            entry = cache.cache_file(folder, file.path, key) if folder is not None else None
            return _open(file, entry, partial(self.complete, [file]))

        with ThreadPoolExecutor(_THREADS) as pool, self._bar(len(wanted), "opening", "file") as bar:
            self.indexes: dict[DataFile, FileIndex] = {}
            for file, index in zip(wanted, pool.map(opened, wanted), strict=True):
                self.indexes[file] = index
                bar.update(1)

    def missing(self, data_files: Iterable[DataFile] | None = None) -> list[DataFile]:
        """Those of the files (default: all) that are not indexed yet."""
        asked = self.indexes if data_files is None else data_files
        return [file for file in asked if not self.indexes[file].is_indexed]

    def complete(self, data_files: Iterable[DataFile] | None = None, lock: str = "") -> None:
        """Index what is missing of the files (default: all), in their order, in parallel.

        Processes that index into the same folder wait for each other, unless they give different names as their
        `lock`, because they have different files. Raises `UserError` where a file changed since this object was made.
        """
        missing = self.missing(data_files)
        if not missing:
            return
        folders = {entry.parent for file in missing if (entry := self.indexes[file].entry) is not None}

        def all_kept() -> bool:
            while missing and self.indexes[missing[0]].load():
                missing.pop(0)
            return not missing

        with cache.locked(folders, lock, until=all_kept):
            left = [file for file in missing if not self.indexes[file].load()]
            if left:
                cache.sweep(folders)
                self._make(left)

    def _bar(self, total: int, what: str, unit: str = "row") -> RowProgress:
        return RowProgress(total, what, self._progress, unit)

    def _make(self, missing: list[DataFile]) -> None:
        began = time.monotonic()
        for file in missing:
            if self.indexes[file].identity != _identity(file):
                raise _changed(file.path)
        tasks = [task for file in missing for task in _tasks(self.indexes[file])]
        left = Counter(task.read.file for task in tasks)
        chunks: dict[DataFile, list[Chunk]] = {file: [] for file in missing}
        total = sum(self.indexes[file].rows for file in missing)
        with self._bar(total, "indexing") as bar:
            for file in (file for file in missing if not left[file]):
                self.indexes[file].set(joined([]))
            for task, chunk in zip(tasks, _run(tasks, total, self._tokenizer, self._workers), strict=True):
                file, index = task.read.file, self.indexes[task.read.file]
                chunks[file].append(chunk)
                bar.update(len(chunk.lengths))
                if len(chunks[file]) == left[file]:
                    index.set(joined(chunks.pop(file), index.outdated))
        if self._progress:
            tell_speed([self.indexes[file] for file in missing], time.monotonic() - began)


def index_files(
    data_files: Sequence[DataFile],
    tokenizer: Tokenizer,
    cache_dir: str | None = None,
    progress: bool = False,
    workers: int | None = None,
    lock: str = "",
) -> list[FileIndex]:
    """The index of each file, complete, kept ones reused. `workers` defaults to the CPUs this process may use."""
    index = DataIndex(data_files, tokenizer, cache_dir, progress, workers)
    index.complete(lock=lock)
    return [index.indexes[file] for file in data_files]


def tell_speed(indexes: Sequence[FileIndex], seconds: float) -> None:
    """Log how fast files were indexed."""
    rows = sum(index.rows for index in indexes)
    megabytes = sum(version(path)[1] for path in {index.path for index in indexes}) / 1e6
    logger.info(
        "indexed %d rows of %d files (%.0f MB) in %.1f s: %.0f rows/s, %.1f MB/s",
        *(rows, len(indexes), megabytes, seconds),
        *(rows / seconds, megabytes / seconds),
    )


def _open(file: DataFile, entry: Path | None, fetch: Callable[[], None]) -> FileIndex:
    """The index of a file as the cache has it, else its layout only."""
    kept = cache.load(entry, file.path) if entry is not None else None
    if kept is not None:
        index = FileIndex(file, kept.layout, entry, kept.identity, fetch)
        if kept.is_current():
            index._records, index.is_kept = kept.records, True
        else:
            index.outdated = kept.records
        return index
    identity = _identity(file)  # from before it is read
    index = FileIndex(file, layout_of(file), entry, identity, fetch)
    if index.layout.error:
        index._records = file_is_bad(index.layout.error)
    return index


def _identity(file: DataFile) -> str:
    try:
        return cache.identity(file.path)
    except OSError:  # it was removed since it was listed: its layout says so
        return ""


def _changed(path: str) -> UserError:
    return UserError(
        f"{shown(path)} changed while it was in use, before it was indexed. Start again; data must stay as they are "
        "while a run reads them"
    )


class _Task(NamedTuple):
    """What one process indexes in one go; with the stamps of rows that were indexed before, where there are any."""

    read: ReadTask
    stamps: np.ndarray | None

    def reading(self) -> str:
        return self.read.reading()


def _tasks(index: FileIndex) -> Iterator[_Task]:
    stamps = index.outdated.stamps if index.outdated is not None else None
    for task in read_tasks(index.file, index.layout):
        yield _Task(task, stamps[task.first : task.first + task.rows] if stamps is not None else None)


def _run(tasks: list[_Task], rows: int, tokenizer: Tokenizer, workers: int | None) -> Iterator[Chunk]:
    """Results in the order of `tasks`."""
    workers = workers or len(os.sched_getaffinity(0))
    if rows < _POOL_ROWS or workers < 2 or len(tasks) < 2:
        yield from (_index_chunk(tokenizer, task) for task in tasks)
        return
    yield from in_order(_index_chunk, tokenizer, tasks, workers, "indexing process", _Task.reading)


def _index_chunk(tokenizer: Tokenizer, task: _Task) -> Chunk:
    indexer = TaskIndexer(task.read, tokenizer, task.stamps)
    for _ in indexer.rows():
        pass
    return indexer.chunk()
