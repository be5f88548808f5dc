"""Raw rows of parquet and jsonl files.

Guarantees: nothing is decoded; consecutive rows of a parquet row group cost one read of it (and only of the needed
columns); a jsonl line is one `pread` at its known offset. The open files and row groups of a process are a small cache
that a forked process does not inherit. Raises whatever the libraries raise: callers turn it into a bad row.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Row groups of one process: at least one, else up to so many bytes. Several stay because a pack mixes datasets.
CACHED_BYTES = 256 * 2**20
_BATCH_ROWS = 64  # small batches also avoid Arrow's 2 GiB limit on a nested column of one batch
_OPEN_FILES = 16

_Version = tuple[str, int, int]  # path, size, modification time: a file that was replaced is another file
_groups: OrderedDict[tuple[_Version, int, tuple[str, ...]], pa.Table] = OrderedDict()
_parquet: OrderedDict[_Version, pq.ParquetFile] = OrderedDict()
_descriptors: OrderedDict[_Version, int] = OrderedDict()


def forget_open_files() -> None:
    """Drop every cached row group and close every file of this process."""
    _groups.clear()
    _parquet.clear()
    while _descriptors:
        os.close(_descriptors.popitem()[1])


# A forked DataLoader worker shares the parent's file positions: it must open its own.
os.register_at_fork(after_in_child=forget_open_files)


def parquet_layout(path: str) -> tuple[list[int], list[str]]:
    """(rows of each row group, column names) from the file's footer."""
    file = _open_parquet(path)
    metadata = file.metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], file.schema_arrow.names


def parquet_rows(path: str, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every row of a row group, read in small batches and not kept."""
    for batch in _open_parquet(path).iter_batches(_BATCH_ROWS, [group], list(columns), use_threads=False):
        for row in range(batch.num_rows):
            yield {name: batch.column(name)[row].as_py() for name in columns}


def parquet_row(path: str, group: int, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """Row `row` of row group `group`; the row group stays in memory for the next ones."""
    table = _row_group(path, group, tuple(columns))
    return {name: table.column(name)[row].as_py() for name in columns}


def jsonl_lines(path: str) -> np.ndarray:
    """int64 [lines, 2]: offset and length in bytes of every line, without its line break."""
    places, offset = array("q"), 0  # 16 bytes a line, where a list would take 100
    with open(path, "rb") as file:
        for line in file:
            places.extend((offset, len(line.rstrip(b"\r\n"))))
            offset += len(line)
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def jsonl_row(path: str, offset: int, length: int) -> dict[str, Any]:
    """The JSON object in the line at `offset`. Raises ValueError."""
    content = json.loads(os.pread(_descriptor(path), length, offset).decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    return content


def _row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    key = (_version(path), group, columns)
    if key in _groups:
        _groups.move_to_end(key)
        return _groups[key]
    file = _open_parquet(path)
    batches = list(file.iter_batches(_BATCH_ROWS, [group], list(columns), use_threads=False))
    table = pa.Table.from_batches(batches).select(list(columns))
    _groups[key] = table
    while len(_groups) > 1 and sum(kept.nbytes for kept in _groups.values()) > CACHED_BYTES:
        _groups.popitem(last=False)
    return table


def _open_parquet(path: str) -> pq.ParquetFile:
    key = _version(path)
    if key not in _parquet:
        _parquet[key] = pq.ParquetFile(path)
        if len(_parquet) > _OPEN_FILES:
            _parquet.popitem(last=False)
    _parquet.move_to_end(key)
    return _parquet[key]


def _descriptor(path: str) -> int:
    key = _version(path)
    if key not in _descriptors:
        _descriptors[key] = os.open(path, os.O_RDONLY)
        if len(_descriptors) > _OPEN_FILES:
            os.close(_descriptors.popitem(last=False)[1])
    _descriptors.move_to_end(key)
    return _descriptors[key]


def _version(path: str) -> _Version:
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns
