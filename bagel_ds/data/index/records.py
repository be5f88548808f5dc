"""What the index remembers of the rows of a file, and making it from rows.

Guarantees: rows become records independently of each other, in any process; a row that fails becomes a reason. A row
that names other files (pictures beside a jsonl file) carries a stamp of their sizes and times, so that a later pass
reads only those rows again whose files have changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from bagel_ds.data.formats.record import ParsedRow, Record, decode_record, encode_record, reason_of
from bagel_ds.data.index.data_file import ReadTask, parsed, read_rows
from bagel_ds.model_folder.tokenizer import Tokenizer

WHOLE_FILE = -1  # in place of a row number
MISSING = -1  # in place of a folder's modification time


class BadRows:
    """(row, reason) of rows that cannot be used, in order; row -1 stands for the file as a whole.

    rows: int64 [bad]; offsets: int64 [bad + 1] into text: uint8, the reasons' UTF-8 end to end.
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, text: np.ndarray) -> None:
        self.rows, self.offsets, self.text = rows, offsets, text

    @classmethod
    def of(cls, found: Sequence[tuple[int, str]]) -> BadRows:
        reasons = [reason.encode("utf-8", "backslashreplace") for _, reason in found]
        offsets = np.cumsum([0, *map(len, reasons)], dtype=np.int64)
        rows = np.array([row for row, _ in found], dtype=np.int64)
        return cls(rows, offsets, np.frombuffer(b"".join(reasons), np.uint8))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._from_to(0, len(self))

    def between(self, first: int, stop: int) -> Iterator[tuple[int, str]]:
        """Those of the rows from `first` to before `stop`."""
        return self._from_to(*np.searchsorted(self.rows, (first, stop)).tolist())

    def _from_to(self, first: int, stop: int) -> Iterator[tuple[int, str]]:
        for number in range(first, stop):
            start, end = self.offsets[number : number + 2].tolist()
            yield int(self.rows[number]), self.text[start:end].tobytes().decode()


NONE_BAD = BadRows.of([])


class FileRecords(NamedTuple):
    """What one data file holds, row by row.

    numbers: int32, all rows' records end to end; offsets: int64 [rows + 1] into it (an unusable row is empty); stamps:
    int64 [rows], see `file_stamp`, or [0] where rows name no files; folders: modification time in ns, before anything
    in it was read, of each folder that holds a file that a row names.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    bad: BadRows
    stamps: np.ndarray
    folders: dict[str, int]

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def numbers_of(self, row: int) -> list[int]:
        start, stop = self.offsets[row : row + 2].tolist()
        found: list[int] = self.numbers[start:stop].tolist()
        return found

    def record(self, row: int) -> Record | None:
        """None where the row cannot be used."""
        numbers = self.numbers_of(row)
        return decode_record(numbers) if numbers else None


def file_is_bad(reason: str) -> FileRecords:
    """Of a file that cannot be used as a whole."""
    none = np.empty(0, np.int64)
    return FileRecords(none.astype(np.int32), np.zeros(1, np.int64), BadRows.of([(WHOLE_FILE, reason)]), none, {})


def file_stamp(paths: Iterable[str]) -> int:
    """A number that differs when the size or time of one of the files does, or whether it exists; 0 for no files."""
    digest = b""
    for path in paths:
        try:
            status = os.stat(path)
            digest += b"%d %d\n" % (status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):
            digest += b"missing\n"
    return int.from_bytes(blake2b(digest, digest_size=8).digest(), "little", signed=True) if digest else 0


def folder_time(folder: str) -> int:
    """Modification time in ns, -1 where there is no such folder."""
    try:
        return os.stat(folder).st_mtime_ns
    except (OSError, ValueError):
        return MISSING


@dataclass
class Chunk:
    """Of consecutive rows: their records' numbers end to end and lengths; (row in the chunk, reason) of bad rows.

    A row that is as the index had it already is only marked as such.
    """

    numbers: list[int] | np.ndarray = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)


class TaskIndexer:
    """Turns the rows of a task into a `Chunk` while they are read."""

    def __init__(self, task: ReadTask, tokenizer: Tokenizer, known_stamps: np.ndarray | None = None) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._known = known_stamps.tolist() if known_stamps is not None else None
        self._chunk = Chunk()

    def rows(self) -> Iterator[ParsedRow | str]:
        """Every row parsed, or the reason why it cannot be used; rows that are as before are left out."""
        chunk, source, folder = self._chunk, self._task.file.source, self._task.file.folder
        for number, row in enumerate(read_rows(self._task)):
            files = source.files(row, folder) if folder.path and not isinstance(row, str) else []
            for place in {os.path.dirname(path) for path in files} - chunk.folders.keys():
                chunk.folders[place] = folder_time(place)  # before its files are read: later changes show
            chunk.stamps.append(file_stamp(files))
            chunk.same.append(self._known is not None and self._known[number] == chunk.stamps[-1])
            if chunk.same[-1]:
                chunk.lengths.append(0)
            else:
                yield self._index(parsed(self._task.file, row))

    def _index(self, row: ParsedRow | str) -> ParsedRow | str:
        chunk, record = self._chunk, list[int]()
        if not isinstance(row, str):
            try:
                record = encode_record(row, self._tokenizer)
            except Exception as error:  # what damaged texts and images raise is an open set
                row = reason_of(error)
        if isinstance(row, str):
            chunk.bad.append((len(chunk.lengths), row))
        assert isinstance(chunk.numbers, list)
        chunk.numbers.extend(record)
        chunk.lengths.append(len(record))
        return row

    def chunk(self) -> Chunk:
        """To be called when `rows` has ended."""
        self._chunk.numbers = np.array(self._chunk.numbers, dtype=np.int32)
        return self._chunk


def joined(chunks: Sequence[Chunk], before: FileRecords | None = None) -> FileRecords:
    """The records of a whole file; `before` holds those of rows marked as the same."""
    first = 0
    numbers, lengths, stamps, bad = [np.empty(0, np.int32)], [0], list[int](), list[tuple[int, str]]()
    folders: dict[str, int] = {}
    for chunk in chunks:
        if any(chunk.same):
            assert before is not None
            chunk = _filled(chunk, before, first)
        numbers.append(np.asarray(chunk.numbers, np.int32))
        lengths += chunk.lengths
        bad += [(first + row, reason) for row, reason in chunk.bad]
        stamps += chunk.stamps
        for folder, time in chunk.folders.items():
            folders[folder] = min(time, folders.get(folder, time))  # of two times the earlier: it shows a change
        first += len(chunk.lengths)
    offsets = np.cumsum(lengths, dtype=np.int64)
    kept = np.array(stamps if folders else [], np.int64)
    return FileRecords(np.concatenate(numbers), offsets, BadRows.of(bad), kept, folders)


def _filled(chunk: Chunk, before: FileRecords, first: int) -> Chunk:
    """The chunk with the rows that are the same, from `first` on in `before`."""
    numbers, lengths, start = list[int](), list[int](), 0
    bad_before = {row - first: reason for row, reason in before.bad.between(first, first + len(chunk.lengths))}
    bad = dict(chunk.bad) | {row: reason for row, reason in bad_before.items() if chunk.same[row]}
    for row, (length, same) in enumerate(zip(chunk.lengths, chunk.same, strict=True)):
        record = before.numbers_of(first + row) if same else chunk.numbers[start : start + length]
        start += length
        numbers.extend(record)
        lengths.append(len(record))
    return replace(chunk, numbers=numbers, lengths=lengths, bad=sorted(bad.items()))


def differing(one: FileRecords, other: FileRecords) -> list[int]:
    """Rows that are not the same in both, -1 where the files as a whole are not."""
    if one.rows != other.rows:
        return [WHOLE_FILE]
    if np.array_equal(one.numbers, other.numbers) and np.array_equal(one.offsets, other.offsets):
        found = set()
    else:
        found = {row for row in range(one.rows) if one.numbers_of(row) != other.numbers_of(row)}
    return sorted(found | {row for row, _ in set(one.bad) ^ set(other.bad)})
