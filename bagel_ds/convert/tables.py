"""The input of a conversion as numbered rows: JSON, JSONL, CSV, TSV, parquet, Arrow and folders of pictures.

Guarantees: rows come in the same order each time, also from the middle on, so that a conversion can continue. A row
that can't be read is a row with a fault; a file that can't be read as a whole raises `UserError`. Pictures are not read
here.
"""

from __future__ import annotations

import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bagel_ds.data.files.filesystems import regular_status
from bagel_ds.data.files.footers import parquet_layout
from bagel_ds.data.files.lines import jsonl_lines
from bagel_ds.data.files.rows import jsonl_row, parquet_rows
from bagel_ds.errors import UserError, shown
from bagel_ds.git_lfs import pointer_fault

_LOOKED_AT = 100  # rows of a jsonl or JSON file that tell its columns
_LONGEST_FIELD = 16 * 2**20  # characters of a CSV field


class Row(NamedTuple):
    """A row as read; `fault` is why it can't be used, or empty."""

    place: str
    values: dict[str, Any]
    fault: str = ""


class Table(ABC):
    """Numbered rows."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files = list(files)
        self.folder = folder  # relative paths of pictures begin here
        self.count = 0
        self.columns: list[str] = []

    @abstractmethod
    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        """The rows from number `start` on, with at least those of `columns` that they have."""

    def identity(self) -> dict[str, Any]:
        """Changes when a file is added, removed, renamed or written to."""
        digest = blake2b(digest_size=16)
        for path in self.files:
            status = regular_status(path)
            name = os.fsencode(os.path.relpath(path, self.folder))
            digest.update(b"%s\0%d %d\n" % (name, status.st_size, status.st_mtime_ns))
        return {"files": len(self.files), "digest": digest.hexdigest()}


class LineTable(Table):
    """A jsonl file. Blank lines are not rows."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        self.path = path
        self.places, _ = jsonl_lines(str(path))
        self.numbers = np.flatnonzero(self.places[:, 1])
        self.count = len(self.numbers)
        some = (row.values for number, row in zip(range(_LOOKED_AT), self.rows(0, ())))
        self.columns = list(dict.fromkeys(key for values in some for key in values))

    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        for number in map(int, self.numbers[start:]):
            offset, length = map(int, self.places[number])
            place = f"{self.path.name}, line {number + 1}"
            try:
                yield Row(place, jsonl_row(str(self.path), offset, length))
            except OSError as error:
                yield Row(place, {}, str(error))


class JsonTable(Table):
    """A JSON array, read as a whole."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        self.path = path
        try:
            self.items = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}. Correct the file, or download it again.") from None
        if not isinstance(self.items, list):
            raise UserError(f"{path} holds {shown(self.items)}, expected a list of rows (or a jsonl file)")
        self.count = len(self.items)
        some = (item for item in self.items[:_LOOKED_AT] if isinstance(item, dict))
        self.columns = list(dict.fromkeys(key for item in some for key in item))

    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        for number, item in enumerate(self.items[start:], start):
            place = f"{self.path.name}, item {number + 1}"
            if isinstance(item, dict):
                yield Row(place, item)
            else:
                yield Row(place, {}, f"expected a JSON object, found {shown(item)}")


class CsvTable(Table):
    """A CSV or TSV file with a line of column names."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        self.path = path
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        header = next(self._records(), None)
        if header is None or header.fault:
            reason = header.fault if header else "it is empty"
            raise UserError(f"{path} has no line of column names: {reason}")
        self.columns = [name.strip() for name in header.values["fields"]]
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise UserError(f"{path} names the column {shown(twice[0])} twice; rename one of the two")
        self.count = sum(1 for _ in self._records()) - 1

    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        for number, record in enumerate(self._records(), -1):
            if number < max(start, 0):
                continue
            fields = record.values.get("fields", [])
            if record.fault:
                yield record
            elif len(fields) != len(self.columns):
                yield Row(record.place, {}, f"it has {len(fields)} fields, expected {len(self.columns)}")
            else:
                yield Row(record.place, dict(zip(self.columns, fields, strict=True)))

    def _records(self) -> Iterator[Row]:
        """Every record, also the column names, as `fields`; blank lines are none."""
        csv.field_size_limit(_LONGEST_FIELD)
        # Bytes that are not UTF-8 become surrogates, so that they cost their own row only.
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter, strict=True)
            while True:
                place = f"{self.path.name}, line {reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Row(place, {}, f"not valid {self.path.suffix[1:].upper()} ({error})")
                    continue
                if any("\udc80" <= letter <= "\udcff" for field in fields for letter in field):
                    yield Row(place, {}, "the line is not UTF-8")
                elif fields:
                    yield Row(place, {"fields": fields})


class ParquetTable(Table):
    """Parquet files, one after the other."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        super().__init__(files, folder)
        self.layouts = [parquet_layout(str(path))[:2] for path in files]
        self.count = sum(sum(groups) for groups, _ in self.layouts)
        self.columns = list(dict.fromkeys(name for _, names in self.layouts for name in names))

    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        first = 0  # number of the first row of a group
        for path, (groups, names) in zip(self.files, self.layouts, strict=True):
            here = [name for name in columns if name in names]
            offset = 0  # rows of the file before the group
            for group, count in enumerate(groups):
                if first + count > start:
                    yield from self._group(path, group, offset, count, here, max(start - first, 0))
                first, offset = first + count, offset + count

    def _group(
        self, path: Path, group: int, offset: int, count: int, columns: list[str], skipped: int
    ) -> Iterator[Row]:
        name = path.relative_to(self.folder).as_posix()
        done, fault = 0, ""
        try:
            for read in parquet_rows(str(path), group, columns):
                done += 1
                if done > skipped:
                    yield _read(f"{name}, row {offset + done - 1}", read)
        except (OSError, pa.ArrowException) as error:
            fault = f"row group {group} can't be read ({' '.join(str(error).split())})"
        for number in range(max(done, skipped), count):
            yield Row(f"{name}, row {offset + number}", {}, fault)


class ArrowTable(Table):
    """Files of a data set that Hugging Face `datasets` saved with `save_to_disk`."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        super().__init__(files, folder)
        for path in self.files:
            for batch in self._batches(path):
                self.count += batch.num_rows
                self.columns = self.columns or batch.schema.names

    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        first = 0
        for path in self.files:
            offset = 0
            for batch in self._batches(path):
                here = [name for name in columns if name in batch.schema.names]
                for number in range(max(start - first, 0), batch.num_rows):
                    yield _read(f"{path.name}, row {offset + number}", _ArrowRow(batch, number, here))
                first, offset = first + batch.num_rows, offset + batch.num_rows

    def _batches(self, path: Path) -> Iterator[pa.RecordBatch]:
        try:
            with pa.memory_map(os.fspath(path)) as file:
                try:
                    yield from pa.ipc.open_stream(file)
                except pa.ArrowInvalid:  # the other form of Arrow's files
                    reader = pa.ipc.open_file(file)
                    yield from map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowException as error:
            reason = pointer_fault(path) or " ".join(str(error).split())
            raise UserError(f"{path} can't be read as Arrow data: {reason}. Save or download it again.") from None


class _ArrowRow:
    def __init__(self, batch: pa.RecordBatch, number: int, columns: list[str]) -> None:
        self.batch, self.number, self.columns = batch, number, columns

    def __call__(self) -> dict[str, Any]:
        return {name: self.batch.column(name)[self.number].as_py() for name in self.columns}


def _read(place: str, read: Any) -> Row:
    try:
        return Row(place, read())
    except (ValueError, OSError, pa.ArrowException) as error:  # such as a text that is not UTF-8
        return Row(place, {}, f"the row can't be read ({' '.join(str(error).split())})")


# -------------------------------------------------------------------------------------------------- folders as tables
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+")  # how `datasets` names the parquet files of a split


def table_of_folder(folder: Path, split: str | None) -> Table | None:
    """A folder that `datasets` saved, of parquet files, or with a metadata file; None where it is none of these."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        folder /= _one_split(folder, splits, split)
        split = None
    if arrow := sorted(path for path in folder.glob("*.arrow") if not path.name.startswith((".", "cache-"))):
        _no_split(folder, split)
        return ArrowTable(arrow, folder)
    below = (path for path in sorted(folder.rglob("*.parquet")))
    parquet = [path for path in below if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    if parquet:
        by_split: dict[str, list[Path]] = {}
        for path in parquet:
            match = _SPLIT.match(path.name)
            by_split.setdefault(match[1] if match else "", []).append(path)
        if split is not None or len(by_split) > 1:
            parquet = by_split[_one_split(folder, sorted(by_split), split)]
        return ParquetTable(parquet, folder)
    _no_split(folder, split)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return LineTable(folder / name) if name.endswith("l") else CsvTable(folder / name)
    return None


def _one_split(folder: Path, splits: list[str], given: str | None) -> str:
    if given in splits:
        return str(given)
    if given is None and len(splits) == 1:
        return splits[0]
    names = ", ".join(name or "(files without a split in their names)" for name in splits) or "none"
    found = "more than one split" if given is None else f"no split {given!r}"
    raise UserError(f"{folder} holds {found}; pass --split with one of: {names}")


def _no_split(folder: Path, split: str | None) -> None:
    if split is not None:
        raise UserError(f"--split {split} has no meaning for {folder}, which holds no splits; leave it out")
