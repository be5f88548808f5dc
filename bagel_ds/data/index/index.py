"""The index: what each row will cost, from one pass over the files that decodes nothing.

Guarantees: for every row the token length of each text that could be used and the size of each image (headers only),
or the reason why the row cannot be used; nothing about a row is fatal. Where rows lie is known of every file from the
start (`file_rows.py`); what they hold is looked up file by file, made where it is not kept yet (`index_cache.py`), so
that work can begin before all files are indexed. Files are indexed once, and again when they change, in parallel when
there is enough to do.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from bagel_ds.data.formats.record import ParsedRow, encode_record, reason_of
from bagel_ds.data.index import cache
from bagel_ds.data.index.cache import FileRecords
from bagel_ds.data.index.data_file import DataFile, FileLayout, ReadTask, layout_of, parsed_rows, read_tasks
from bagel_ds.data.index.progress import RowProgress
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tokenizer import Tokenizer
from bagel_ds.processes import in_order

logger = logging.getLogger("bagel_ds")

__all__ = ["DataFile", "DataIndex", "FileIndex", "index_files"]

_POOL_ROWS = 20_000  # below this, starting processes costs more than it saves
_THREADS = 16  # that wait for file systems, remote ones above all


class FileIndex:
    """One data file: `layout` from the start; `records` from the cache, or made, when they are first asked for.

    `bad` holds (row, reason) of what cannot be used, row -1 for the file as a whole; it is empty until `is_indexed`.
    """

    def __init__(self, file: DataFile, layout: FileLayout, fetch: Callable[[], FileRecords]) -> None:
        self.file, self.layout = file, layout
        self.path, self.unit_rows, self.places = layout.path, layout.unit_rows, layout.places
        self.columns, self.digest, self.rows = layout.columns, layout.digest, layout.rows
        self.bad: tuple[tuple[int, str], ...] = ()
        self.is_indexed = False
        self.held: FileRecords | None = None
        self._fetch = fetch

    @property
    def records(self) -> FileRecords:
        if self.held is None:
            self.held = self._fetch()
        return self.held

    @property
    def numbers(self) -> np.ndarray:
        return self.records.numbers

    @property
    def offsets(self) -> np.ndarray:
        return self.records.offsets

    def found(self, bad: tuple[tuple[int, str], ...], records: FileRecords | None = None) -> None:
        """The file is indexed; `records` is given where no cache keeps them."""
        self.is_indexed, self.bad, self.held = True, bad, records


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
        self._entries = {
            file: cache.cache_file(folder, file.path, f"{file.key} {tokenizer.fingerprint}")
            for file in wanted
            if (folder := folders[file.path.rpartition("/")[0]]) is not None
        }
        with ThreadPoolExecutor(_THREADS) as pool:
            kept = dict(zip(wanted, pool.map(self._load, wanted), strict=True))
            unknown = [file for file in wanted if kept[file] is None]
            self._identities = dict(zip(unknown, pool.map(_identity, unknown), strict=True))
            layouts = self._layouts(unknown, pool)
        for file, entry in kept.items():
            if entry is not None:
                self._identities[file], layouts[file] = entry.identity, entry.layout
        self.indexes = {file: FileIndex(file, layouts[file], partial(self._fetch, file)) for file in wanted}
        for file, entry in kept.items():
            if entry is not None:
                self.indexes[file].found(entry.bad)
        for file in unknown:
            if error := layouts[file].error:
                self.indexes[file].found(((-1, error),), _no_records(((-1, error),)))

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
        folders = {self._entries[file].parent for file in missing if file in self._entries}
        if not missing:
            return

        def all_kept() -> bool:
            while missing and self._is_kept(missing[0]):
                missing.pop(0)
            return not missing

        with cache.locked(folders, lock, until=all_kept):
            left = [file for file in missing if not self._is_kept(file)]
            if left:
                cache.sweep(folders)
                self._make(left)

    def _load(self, file: DataFile) -> cache.Entry | None:
        return cache.load(self._entries[file], file.path) if file in self._entries else None

    def _layouts(self, data_files: Sequence[DataFile], pool: ThreadPoolExecutor) -> dict[DataFile, FileLayout]:
        with RowProgress(len(data_files), "reading footers", self._progress, unit="file") as bar:
            layouts = {}
            for file, layout in zip(data_files, pool.map(layout_of, data_files), strict=True):
                layouts[file] = layout
                bar.update(1)
            return layouts

    def _is_kept(self, file: DataFile) -> bool:
        """Whether the file is indexed by now, by whomever."""
        index = self.indexes[file]
        if not index.is_indexed and (entry := self._load(file)) is not None:
            _check_unchanged(file, entry.layout.digest == index.digest)
            index.found(entry.bad)
        return index.is_indexed

    def _fetch(self, file: DataFile) -> FileRecords:
        index = self.indexes[file]
        for _ in range(2):
            self.complete([file])
            if index.held is not None:
                return index.held
            kept = cache.load_records(self._entries[file], file.path)
            if kept is not None:
                return kept
            index.is_indexed = False  # its entry is gone: made again
        raise UserError(f"{self._entries[file]} cannot be read although it was just written; give an --index_cache")

    def _make(self, missing: list[DataFile]) -> None:
        began = time.monotonic()
        for file in missing:
            _check_unchanged(file, self._identities[file] == _identity(file))
        tasks = [task for file in missing for task in read_tasks(file, self.indexes[file].layout)]
        left = Counter(task.file for task in tasks)
        parts: dict[DataFile, list[_Chunk]] = {file: [] for file in missing}
        total = sum(self.indexes[file].rows for file in missing)
        with RowProgress(total, "indexing", self._progress) as bar:
            for file in (file for file in missing if not left[file]):
                self._finish(file, [])
            for task, part in zip(tasks, _run(tasks, total, self._tokenizer, self._workers), strict=True):
                file = task.file
                parts[file].append(part)
                bar.update(len(part.lengths))
                if len(parts[file]) == left[file]:
                    self._finish(file, parts.pop(file))
        if self._progress:
            tell_speed([self.indexes[file] for file in missing], time.monotonic() - began)

    def _finish(self, file: DataFile, parts: list[_Chunk]) -> None:
        index, records = self.indexes[file], _joined(parts)
        kept = file in self._entries and cache.save(self._entries[file], index.layout, records, self._identities[file])
        index.found(records.bad, None if kept else records)


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


# ------------------------------------------------------------------------------------------------- rows into records
class _Chunk(NamedTuple):
    """Result of one task: records of consecutive rows end to end, their lengths, and (row in chunk, reason)."""

    numbers: np.ndarray  # int32
    lengths: np.ndarray  # int32 [rows]
    bad: list[tuple[int, str]]


def _no_records(bad: tuple[tuple[int, str], ...]) -> FileRecords:
    return FileRecords(np.empty(0, np.int32), np.zeros(1, np.int64), bad)


def _joined(parts: list[_Chunk]) -> FileRecords:
    if not parts:
        return _no_records(())
    lengths = np.concatenate([part.lengths for part in parts])
    bad = []
    first = 0
    for part in parts:
        bad += [(first + row, reason) for row, reason in part.bad]
        first += len(part.lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return FileRecords(np.concatenate([part.numbers for part in parts]), offsets, tuple(bad))


def _identity(file: DataFile) -> str:
    try:
        return cache.identity(file.path)
    except OSError:  # gone since it was listed: its layout says so
        return ""


def _check_unchanged(file: DataFile, unchanged: bool) -> None:
    if not unchanged:
        raise UserError(
            f"{file.path} changed while it was in use, before it was indexed: start again; data must stay as they are "
            "while a run reads them"
        )


def tell_speed(indexes: Sequence[FileIndex], seconds: float) -> None:
    """Say in the log how fast files were indexed."""
    rows = sum(index.rows for index in indexes)
    megabytes = sum(cache.size_of(path) for path in {index.path for index in indexes}) / 1e6
    logger.info(
        "indexed %d rows of %d files (%.0f MB) in %.1f s: %.0f rows/s, %.1f MB/s",
        *(rows, len(indexes), megabytes, seconds),
        *(rows / seconds, megabytes / seconds),
    )


def _run(tasks: list[ReadTask], rows: int, tokenizer: Tokenizer, workers: int | None) -> Iterator[_Chunk]:
    """Results in the order of `tasks`."""
    workers = workers or len(os.sched_getaffinity(0))
    if rows < _POOL_ROWS or workers < 2 or len(tasks) < 2:
        yield from (_index_chunk(tokenizer, task) for task in tasks)
        return
    yield from in_order(_index_chunk, tokenizer, tasks, workers, "indexing process", ReadTask.reading)


def _index_chunk(tokenizer: Tokenizer, task: ReadTask) -> _Chunk:
    numbers: list[int] = []
    lengths: list[int] = []
    bad: list[tuple[int, str]] = []
    for parsed in parsed_rows(task):
        record: list[int] | str
        try:
            record = encode_record(parsed, tokenizer) if isinstance(parsed, ParsedRow) else parsed
        except Exception as error:  # what damaged text or images raise is an open set
            record = reason_of(error)
        if isinstance(record, str):
            bad.append((len(lengths), record))
            record = []
        numbers.extend(record)
        lengths.append(len(record))
    return _Chunk(np.array(numbers, dtype=np.int32), np.array(lengths, dtype=np.int32), bad)
