"""What a parquet file's footer says: rows of each row group, columns.

Guarantees: no value of a footer is believed that contradicts another one or the size of the file, so a damaged footer
costs its own file and neither memory nor the row numbers of other files. Reads the footer only.
"""

from __future__ import annotations

from hashlib import blake2b

import pyarrow as pa
import pyarrow.parquet as pq

from bagel_ds.data.files.filesystems import Unreadable, open_file

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # of a file: the footer's length, then the magic bytes
_ROWS_PER_BYTE = 8  # more rows than a file has bits hold nothing ...
_ALWAYS_ROWS = 2**20  # ... but equal values of so many rows may fit into a few bytes


def parquet_layout(path: str) -> tuple[list[int], list[str], bytes]:
    """(rows of each row group, column names, a digest of the file's footer); may be called from several threads.

    Raises OSError, and `Unreadable` where the footer cannot be true.
    """
    with open_file(path) as file:
        footer = _footer(file)
        with pq.ParquetFile(file) as opened:
            metadata, names = opened.metadata, opened.schema_arrow.names
        _check(metadata, file.size() - len(footer) - _TAIL_BYTES)
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return rows, names, blake2b(footer, digest_size=16).digest()


def _footer(file: pa.NativeFile) -> bytes:
    """The bytes that say where every column of every row group lies."""
    size = file.size()
    tail = file.read_at(min(size, _TAIL_BYTES), max(size - _TAIL_BYTES, 0))
    if tail[4:] != _MAGIC or file.read_at(4, 0) != _MAGIC:
        raise Unreadable("not a whole parquet file: it must begin and end with PAR1; copy or download it again")
    length = int.from_bytes(tail[:4], "little")
    if length > size - _TAIL_BYTES:
        raise Unreadable(f"its footer claims {length:,} bytes, the file has {size:,}")
    footer: bytes = file.read_at(length, size - _TAIL_BYTES - length)
    return footer


def _check(metadata: pq.FileMetaData, data_bytes: int) -> None:
    """Raise `Unreadable` where counts or places contradict each other or the size of the file."""
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        where = f"row group {number} of its footer claims"
        total += group.num_rows
        if group.num_rows < 0:
            raise Unreadable(f"{where} {group.num_rows:,} rows")
        for column in map(group.column, range(group.num_columns)):
            if column.num_values < group.num_rows:
                raise Unreadable(f"{where} {group.num_rows:,} rows but {column.num_values:,} values of a column")
            start, size = column.data_page_offset, column.total_compressed_size
            if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
                start = column.dictionary_page_offset
            if min(start, size) < 0 or start + size > data_bytes:
                raise Unreadable(f"{where} a column beyond the end of the file")
    if total != metadata.num_rows:
        raise Unreadable(f"its footer claims {metadata.num_rows:,} rows, its row groups {total:,}")
    if total > max(_ROWS_PER_BYTE * data_bytes, _ALWAYS_ROWS):
        raise Unreadable(f"its footer claims {total:,} rows in {data_bytes:,} bytes")
