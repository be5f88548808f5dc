"""Raw rows of parquet and jsonl files.

Guarantees: nothing is decoded; parquet rows cost as few reads of their row group (and only of the needed columns) as
`row_cache.py` can do with them; a jsonl line is one `pread` at its known offset. The open files and rows of a process
are a small cache that a forked process does not inherit. Raises whatever the libraries raise: callers turn it into a
bad row.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bagel_ds.data.files.filesystems import open_parquet, parquet_footer, version
from bagel_ds.data.files.row_cache import GroupKey, Row, RowCache, Version

# Bytes of rows that are read at once: small batches also avoid Arrow's 2 GiB limit on a nested column of one batch.
_BATCH_BYTES = 16 * 2**20
_BATCH_ROWS = 64  # at most
_OPEN_FILES = 16

_parquet: OrderedDict[Version, pq.ParquetFile] = OrderedDict()
_descriptors: OrderedDict[Version, int] = OrderedDict()


def _stream(key: GroupKey) -> Iterator[tuple[int, Callable[[], Row]]]:
    first = 0
    for batch in _batches(key.path, key.group, key.columns):
        for row in range(batch.num_rows):
            yield first + row, partial(_values, batch, row, key.columns)
        first += batch.num_rows


rows = RowCache(_stream)


def forget_open_files() -> None:
    """Drop every kept row and close every file of this process."""
    rows.clear()
    _parquet.clear()
    while _descriptors:
        os.close(_descriptors.popitem()[1])


# A forked process shares the parent's file positions: it must open its own.
os.register_at_fork(after_in_child=forget_open_files)


def parquet_layout(path: str) -> tuple[list[int], list[str], bytes]:
    """(rows of each row group, column names, a digest of the file's footer); may be called from several threads."""
    with open_parquet(path) as file:
        metadata = file.metadata
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return rows, file.schema_arrow.names, blake2b(parquet_footer(path), digest_size=16).digest()


def parquet_rows(path: str, group: int, columns: Sequence[str]) -> Iterator[Row]:
    """Every row of a row group, read in small batches and not kept."""
    for batch in _batches(path, group, columns):
        for row in range(batch.num_rows):
            yield _values(batch, row, columns)


def parquet_row(path: str, group: int, row: int, columns: Sequence[str]) -> Row:
    """Row `row` of row group `group`; see `expect_parquet_row`."""
    return rows.row(GroupKey(path, group, tuple(columns)), row, version(path))


def expect_parquet_row(path: str, group: int, row: int, columns: Sequence[str]) -> None:
    """This process will ask for the row, after all those announced before; it changes how often files are read only."""
    rows.expect(GroupKey(path, group, tuple(columns)), row)


def jsonl_lines(path: str) -> tuple[np.ndarray, bytes]:
    """(int64 [lines, 2]: offset and length in bytes of every line, without its line break; a digest of the file)."""
    places, offset = array("q"), 0  # 16 bytes a line, where a list would take 100
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        for line in file:
            places.extend((offset, len(line.rstrip(b"\r\n"))))
            offset += len(line)
            digest.update(line)
    return np.array(places, dtype=np.int64).reshape(-1, 2), digest.digest()


def jsonl_row(path: str, offset: int, length: int) -> dict[str, Any]:
    """The JSON object in the line at `offset`. Raises ValueError."""
    content = json.loads(os.pread(_descriptor(path), length, offset).decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    return content


def _batches(path: str, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    file = _open_parquet(path)
    about = file.metadata.row_group(group)
    rows_at_once = _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)
    rows_at_once = max(1, min(_BATCH_ROWS, rows_at_once))
    return file.iter_batches(rows_at_once, [group], list(columns), use_threads=False)


def _values(batch: pa.RecordBatch, row: int, columns: Sequence[str]) -> Row:
    return {name: batch.column(name)[row].as_py() for name in columns}


def _open_parquet(path: str) -> pq.ParquetFile:
    key = version(path)
    if key not in _parquet:
        _parquet[key] = open_parquet(path)
        if len(_parquet) > _OPEN_FILES:
            _parquet.popitem(last=False)
    _parquet.move_to_end(key)
    return _parquet[key]


def _descriptor(path: str) -> int:
    key = version(path)
    if key not in _descriptors:
        _descriptors[key] = os.open(path, os.O_RDONLY)
        if len(_descriptors) > _OPEN_FILES:
            os.close(_descriptors.popitem(last=False)[1])
    _descriptors.move_to_end(key)
    return _descriptors[key]
