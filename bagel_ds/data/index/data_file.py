"""Where the rows of a data file lie, and reading all of them in order.

Guarantees: a layout costs the footer of a parquet file or one scan of a jsonl file; rows are not parsed. Equal files
have equal layouts on every host. Reading gives each row or the reason why it cannot be read, never an exception: damage
costs only the file, row group or line that it is in.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from bagel_ds.data.files import rows as raw_rows
from bagel_ds.data.files.filesystems import Unreadable, is_uri, regular_status, shown
from bagel_ds.data.files.footers import parquet_layout
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.files.lines import jsonl_lines
from bagel_ds.data.formats.record import VERSION, ParsedRow, reason_of
from bagel_ds.data.formats.source import Source
from bagel_ds.git_lfs import pointer_fault

UNIT_LINES = 256  # lines of a jsonl file that count as one read unit
_TASK_ROWS = 1024  # rows of one `ReadTask`, about


@dataclass(frozen=True)
class DataFile:
    """A file to index. `lines` and `shuffle_seed` choose lines of a jsonl file as the original does."""

    path: str
    source: Source
    folder: ImageFolder = ImageFolder()  # of the pictures that lines name
    lines: int | None = None
    shuffle_seed: int | None = None

    @property
    def key(self) -> str:
        """What the index depends on, apart from the file and the tokenizer."""
        folder = self.folder.key
        source = f"{self.source.name} {self.source.version} {self.source.settings}"
        return f"{VERSION} {source} {folder} {self.lines} {self.shuffle_seed}"


@dataclass(frozen=True)
class FileLayout:
    """The rows of a file, before looking into them.

    unit_rows: int64 [units], rows of each parquet row group or slice of lines; places: int64 [rows, 3], offset, length
    and number of each jsonl line, [0, 3] for parquet; columns: those of a parquet file that its source needs; digest:
    of the file's name and of its footer or lines, so that row numbers mean the same wherever it is equal; error: why
    the file as a whole cannot be used, else empty.
    """

    path: str
    unit_rows: np.ndarray
    places: np.ndarray
    columns: tuple[str, ...] = ()
    digest: str = ""
    error: str = ""

    @cached_property
    def rows(self) -> int:
        return int(self.unit_rows.sum())


class ReadTask(NamedTuple):
    """Consecutive units of one file, read in one go; `places` are those of its lines."""

    file: DataFile
    columns: tuple[str, ...]
    units: list[tuple[int, int]]  # (unit, rows)
    places: np.ndarray
    first: int  # row of the file

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.units)

    def reading(self) -> str:
        """ "it read <file> row groups 3-5", for messages."""
        if len(self.places):
            return f"it read {shown(self.file.path)} lines {self.places[0, 2]}-{self.places[-1, 2]}"
        return f"it read {shown(self.file.path)} row groups {self.units[0][0]}-{self.units[-1][0]}"


def layout_of(file: DataFile) -> FileLayout:
    """Where the rows of `file` lie; a file that can't be opened has no rows and an error."""
    no_places = np.empty((0, 3), dtype=np.int64)
    digest = blake2b(os.fsencode(os.path.basename(file.path)), digest_size=16)
    try:
        if not is_uri(file.path):
            regular_status(file.path)
            if fault := pointer_fault(file.path):
                raise Unreadable(fault)
        if file.source.jsonl:
            lines, content = jsonl_lines(file.path)
            places = _chosen_lines(lines, file.lines, file.shuffle_seed)
            units = [min(UNIT_LINES, len(places) - start) for start in range(0, len(places), UNIT_LINES)]
            digest.update(content + places.tobytes())
            return FileLayout(file.path, np.array(units, np.int64), places, (), digest.hexdigest())
        units, available, footer = parquet_layout(file.path)
        columns = tuple(file.source.columns(available))
        digest.update(footer)
        return FileLayout(file.path, np.array(units, np.int64), no_places, columns, digest.hexdigest())
    except Exception as error:  # what damaged files and file systems raise is an open set
        digest.update(b"cannot be read")
        return FileLayout(file.path, np.empty(0, np.int64), no_places, (), digest.hexdigest(), reason_of(error))


def read_tasks(file: DataFile, layout: FileLayout) -> Iterator[ReadTask]:
    """All rows of a file, in tasks of about `_TASK_ROWS` rows."""
    units: list[tuple[int, int]] = []
    first = rows = 0
    for unit, count in enumerate(layout.unit_rows.tolist()):
        units.append((unit, count))
        rows += count
        if rows >= _TASK_ROWS or unit + 1 == len(layout.unit_rows):
            yield ReadTask(file, layout.columns, units, layout.places[first : first + rows], first)
            units, first, rows = [], first + rows, 0


def parsed_rows(task: ReadTask) -> Iterator[ParsedRow | str]:
    """Every row of `task` in order, or the reason why it cannot be read."""
    return (parsed(task.file, row) for row in read_rows(task))


def read_rows(task: ReadTask) -> Iterator[dict[str, Any] | str]:
    """Every row of `task` in order as the file has it, or the reason why it cannot be read."""
    return _lines(task) if task.file.source.jsonl else _group_rows(task)


def parsed(file: DataFile, row: dict[str, Any] | str) -> ParsedRow | str:
    """One of `read_rows` parsed, or the reason why not."""
    if isinstance(row, str):
        return row
    try:
        return file.source.parse(row, file.folder)
    except Exception as error:  # what parsers raise on odd values is an open set
        return reason_of(error)


def _chosen_lines(lines: np.ndarray, count: int | None, shuffle_seed: int | None) -> np.ndarray:
    """int64 [chosen, 3]: offset, length, line number (from 1), of the lines that the original would use.

    Blank lines count when lines are chosen, as in the original, and are left out then.
    """
    numbers = np.arange(len(lines))
    if shuffle_seed is not None:
        chosen = numbers.tolist()
        random.Random(shuffle_seed).shuffle(chosen)
        numbers = np.array(chosen, dtype=np.int64)
    numbers = np.sort(numbers[:count])
    numbers = numbers[lines[numbers, 1] > 0]
    return np.concatenate([lines[numbers], numbers[:, None].astype(np.int64) + 1], axis=1)


def _lines(task: ReadTask) -> Iterator[dict[str, Any] | str]:
    for offset, length, _ in task.places.tolist():
        try:
            yield raw_rows.jsonl_row(task.file.path, offset, length)
        except Exception as error:
            yield reason_of(error)


def _group_rows(task: ReadTask) -> Iterator[dict[str, Any] | str]:
    """Rows of row groups; what follows a point that cannot be read is bad to the end of its row group."""
    for unit, count in task.units:
        seen, end = 0, ""
        rows = raw_rows.parquet_rows(task.file.path, unit, task.columns)
        while seen < count:
            try:
                values = next(rows)
            except StopIteration:
                end = f"it has {seen} of {count} rows"
                break
            except Exception as error:  # what Arrow raises on damage is an open set
                end = reason_of(error)
                break
            seen += 1
            try:
                yield values()
            except Exception as error:
                yield reason_of(error)
        yield from [f"the row group cannot be read ({end})"] * (count - seen)
