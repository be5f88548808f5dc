"""Raw rows of parquet and jsonl files.

Guarantees: pictures stay encoded. Parquet rows cost as few reads of their row group, and only of the needed columns,
as `row_cache.py` allows; a jsonl line is one `pread` at its known offset. Only regular files are opened. Each process
keeps a few open files and rows; a forked process starts with none. Raises whatever the libraries raise: callers turn it
into a bad row.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bagel_ds.data.files.filesystems import Unreadable, open_parquet, version
from bagel_ds.data.files.row_cache import GroupKey, Row, RowCache, Version

# Bytes of rows that are read at once: small batches also avoid Arrow's 2 GiB limit on a nested column of one batch.
_BATCH_BYTES = 16 * 2**20
_BATCH_ROWS = 64  # at most
_OPEN_FILES = 16

_parquet: OrderedDict[Version, pq.ParquetFile] = OrderedDict()
_descriptors: OrderedDict[Version, int] = OrderedDict()


def _stream(key: GroupKey) -> Iterator[Callable[[], Row]]:
    for batch in _batches(key.path, key.group, key.columns):
        for row in range(batch.num_rows):
            yield partial(_values, batch, row, key.columns)


rows = RowCache(_stream)


def forget_open_files() -> None:
    """Drop all kept rows and close all files of this process."""
    rows.clear()
    _parquet.clear()
    while _descriptors:
        os.close(_descriptors.popitem()[1])


# A forked process shares the parent's file positions: it must open its own.
os.register_at_fork(after_in_child=forget_open_files)


def parquet_rows(path: str, group: int, columns: Sequence[str]) -> Iterator[Callable[[], Row]]:
    """What gives each row of a row group, read in small batches and not kept; a damaged value fails only its row."""
    return _stream(GroupKey(path, group, tuple(columns)))


def parquet_row(path: str, group: int, row: int, columns: Sequence[str]) -> Row:
    """Row `row` of row group `group`; see `expect_parquet_row`."""
    return rows.row(GroupKey(path, group, tuple(columns)), row, version(path))


def parquet_columns(path: str) -> tuple[str, ...]:
    """The names of a file's columns."""
    return tuple(_open_parquet(path).schema_arrow.names)


def expect_parquet_row(path: str, group: int, row: int, columns: Sequence[str]) -> None:
    """Announce that this process will ask for the row, after the rows announced before; saves repeated reads."""
    rows.expect(GroupKey(path, group, tuple(columns)), row)


def jsonl_row(path: str, offset: int, length: int) -> dict[str, Any]:
    """The JSON object in the line at `offset`. Raises OSError."""
    line = os.pread(_descriptor(path), length, offset)
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"the line is not UTF-8 (byte {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the line is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise Unreadable(f"expected a JSON object, found {type(content).__name__}")
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
