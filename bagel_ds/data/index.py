"""The index: what each row will cost, from one pass over the files that decodes nothing.

Guarantees: for every row the token length of each text that could be used and the size of each image (headers only),
or the reason why the row cannot be used; nothing about a row is fatal. Files are indexed once, and again when they
change (`index_cache.py`), in parallel when there is enough to do.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bagel_ds.data import files, index_cache
from bagel_ds.data.index_cache import FileIndex
from bagel_ds.data.progress import RowProgress
from bagel_ds.data.records import VERSION, ParsedRow, encode_record, reason_of
from bagel_ds.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # sources/ is above this module; a file brings its source along
    from bagel_ds.data.sources.source import Source

logger = logging.getLogger("bagel_ds")

UNIT_LINES = 256  # lines of a jsonl file that count as one read unit
_CHUNK_ROWS = 1024  # rows of one task of the process pool
_POOL_ROWS = 20_000  # below this, starting processes costs more than it saves


@dataclass(frozen=True)
class DataFile:
    """A file to index. `lines` and `shuffle_seed` choose lines of a jsonl file as the original does."""

    path: str
    source: Source
    folder: str = ""
    lines: int | None = None
    shuffle_seed: int | None = None

    @property
    def key(self) -> str:
        """What the index depends on besides the file and the tokenizer."""
        folder = os.path.abspath(self.folder) if self.folder else ""
        source = f"{self.source.name} {self.source.version} {self.source.settings}"
        return f"{VERSION} {source} {folder} {self.lines} {self.shuffle_seed}"


class _Layout(NamedTuple):
    """Rows of a file, before looking into them."""

    unit_rows: list[int]
    places: np.ndarray
    columns: tuple[str, ...]
    error: str = ""

    @property
    def rows(self) -> int:
        return sum(self.unit_rows)


class ReadTask(NamedTuple):
    """Consecutive units of one file, to be read in one go; `places` are those of its lines alone."""

    file: DataFile
    columns: tuple[str, ...]
    units: list[tuple[int, int]]  # (unit, rows)
    places: np.ndarray


class _Chunk(NamedTuple):
    """Result of one task: records of consecutive rows end to end, their lengths, and (row in chunk, reason)."""

    numbers: np.ndarray  # int32
    lengths: np.ndarray  # int32 [rows]
    bad: list[tuple[int, str]]


def index_files(
    data_files: Sequence[DataFile],
    tokenizer: Tokenizer,
    cache_dir: str | None = None,
    progress: bool = False,
    workers: int | None = None,
    lock: str = "",
) -> list[FileIndex]:
    """The index of each file, kept ones reused. `workers` defaults to the CPUs this process may use.

    Processes that index into the same folder wait for each other, unless they give different names as their `lock`,
    because they have different files.
    """
    wanted = list(dict.fromkeys(data_files))
    folders = {file: index_cache.cache_folder(file.path, cache_dir) for file in wanted}
    entries = {
        file: index_cache.cache_file(folder, file.path, f"{file.key} {tokenizer.fingerprint}")
        for file, folder in folders.items()
        if folder is not None
    }
    done = {file: index for file in entries if (index := index_cache.load(entries[file], file.path))}
    missing = [file for file in wanted if file not in done]
    if missing:
        with index_cache.locked((folder for file in missing if (folder := folders[file]) is not None), lock):
            kept = [file for file in missing if file in entries]
            done |= {file: index for file in kept if (index := index_cache.load(entries[file], file.path))}
            missing = [file for file in missing if file not in done]
            done |= _index_missing(missing, entries, tokenizer, progress, workers)
    return [done[file] for file in data_files]


def read_tasks(file: DataFile, index: FileIndex) -> list[ReadTask]:
    """All rows of an indexed file, in tasks of about `_CHUNK_ROWS` rows."""
    return list(_tasks(file, _Layout(index.unit_rows.tolist(), index.places, index.columns)))


def parsed_rows(task: ReadTask) -> Iterator[ParsedRow | str]:
    """Every row of `task` in order, or the reason why it cannot be read."""
    return _parsed_lines(task) if task.file.source.jsonl else _parsed_groups(task)


def _index_missing(
    missing: list[DataFile],
    entries: dict[DataFile, Path],
    tokenizer: Tokenizer,
    progress: bool,
    workers: int | None,
) -> dict[DataFile, FileIndex]:
    began = time.monotonic()
    identities = {file: index_cache.identity(file.path) for file in missing}
    layouts = {file: _layout(file) for file in missing}
    tasks = [task for file in missing for task in _tasks(file, layouts[file])]
    left = Counter(task.file for task in tasks)
    parts: dict[DataFile, list[_Chunk]] = {file: [] for file in missing}
    done = {}
    total = sum(layout.rows for layout in layouts.values())
    with RowProgress(total, "indexing", progress) as bar:
        for file in (file for file in missing if not left[file]):
            done[file] = _finish(file, layouts[file], [], entries.get(file), identities[file])
        for task, part in zip(tasks, _run(tasks, total, tokenizer, workers), strict=True):
            file = task.file
            parts[file].append(part)
            bar.update(len(part.lengths))
            if len(parts[file]) == left[file]:
                done[file] = _finish(file, layouts[file], parts.pop(file), entries.get(file), identities[file])
    if progress:
        _tell_speed(missing, total, time.monotonic() - began)
    return done


def _tell_speed(indexed: list[DataFile], rows: int, seconds: float) -> None:
    megabytes = sum(index_cache.size_of(path) for path in {file.path for file in indexed}) / 1e6
    logger.info(
        "indexed %d rows of %d files (%.0f MB) in %.1f s: %.0f rows/s, %.1f MB/s",
        *(rows, len(indexed), megabytes, seconds),
        *(rows / seconds, megabytes / seconds),
    )


def _run(tasks: list[ReadTask], rows: int, tokenizer: Tokenizer, workers: int | None) -> Iterator[_Chunk]:
    """Results in the order of `tasks`."""
    workers = workers or len(os.sched_getaffinity(0))
    if rows < _POOL_ROWS or workers < 2 or len(tasks) < 2:
        yield from (_index_chunk(task, tokenizer) for task in tasks)
        return
    # spawn: the calling process may hold threads and a CUDA context, neither of which survives a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (tokenizer,)) as pool:
        yield from pool.map(_index_in_worker, tasks)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _index_in_worker(task: ReadTask) -> _Chunk:
    assert _worker_tokenizer is not None
    return _index_chunk(task, _worker_tokenizer)


def _layout(file: DataFile) -> _Layout:
    no_places = np.empty((0, 3), dtype=np.int64)
    try:
        if file.source.jsonl:
            places = _chosen_lines(file)
            units = [min(UNIT_LINES, len(places) - start) for start in range(0, len(places), UNIT_LINES)]
            return _Layout(units, places, ())
        unit_rows, available = files.parquet_layout(file.path)
        return _Layout(unit_rows, no_places, tuple(file.source.columns(available)))
    except Exception as error:  # a damaged file is reported, never fatal
        return _Layout([], no_places, (), reason_of(error))


def _chosen_lines(file: DataFile) -> np.ndarray:
    """int64 [lines, 3]: offset, length, line number (from 1), of the lines that the original would use."""
    lines = files.jsonl_lines(file.path)
    chosen = list(range(len(lines)))
    if file.shuffle_seed is not None:
        random.Random(file.shuffle_seed).shuffle(chosen)
    chosen = sorted(chosen[: file.lines])
    return np.concatenate([lines[chosen], np.array(chosen, dtype=np.int64)[:, None] + 1], axis=1)


def _tasks(file: DataFile, layout: _Layout) -> Iterator[ReadTask]:
    """Runs of units with about `_CHUNK_ROWS` rows each."""
    units: list[tuple[int, int]] = []
    first = rows = 0
    for unit, count in enumerate(layout.unit_rows):
        units.append((unit, count))
        rows += count
        if rows >= _CHUNK_ROWS or unit + 1 == len(layout.unit_rows):
            yield ReadTask(file, layout.columns, units, layout.places[first : first + rows])
            units, first, rows = [], first + rows, 0


def _index_chunk(task: ReadTask, tokenizer: Tokenizer) -> _Chunk:
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


def _parsed_lines(task: ReadTask) -> Iterator[ParsedRow | str]:
    source = task.file.source
    for offset, length, _ in task.places.tolist():
        try:
            yield source.parse(files.jsonl_row(task.file.path, offset, length), task.file.folder)
        except Exception as error:
            yield reason_of(error)


def _parsed_groups(task: ReadTask) -> Iterator[ParsedRow | str]:
    """Rows of row groups; what follows a point that cannot be read is bad to the end of its row group."""
    source = task.file.source
    for unit, count in task.units:
        seen = 0
        rows = files.parquet_rows(task.file.path, unit, task.columns)
        while seen < count:
            try:
                row = next(rows)
            except Exception as error:
                reason = f"the row group cannot be read ({reason_of(error)})"
                yield from [reason] * (count - seen)
                break
            seen += 1
            try:
                yield source.parse(row, task.file.folder)
            except Exception as error:
                yield reason_of(error)


def _finish(
    file: DataFile, layout: _Layout, parts: list[_Chunk], entry: Path | None, identity_before: str
) -> FileIndex:
    none = np.empty(0, dtype=np.int32)
    lengths = np.concatenate([none, *(part.lengths for part in parts)])
    bad = [(-1, layout.error)] if layout.error else []
    first = 0
    for part in parts:
        bad += [(first + row, reason) for row, reason in part.bad]
        first += len(part.lengths)
    index = FileIndex(
        path=file.path,
        numbers=np.concatenate([none, *(part.numbers for part in parts)]),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        unit_rows=np.array(layout.unit_rows, dtype=np.int64),
        places=layout.places,
        bad=tuple(bad),
        columns=layout.columns,
    )
    index = FileIndex(**{**index.__dict__, "digest": _digest(index)})
    if entry is not None and not layout.error:
        index_cache.save(entry, index, identity_before)
    return index


def _digest(index: FileIndex) -> str:
    digest = hashlib.blake2b(os.path.basename(index.path).encode(), digest_size=16)
    for array in (index.numbers, index.offsets, index.unit_rows, index.places):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
