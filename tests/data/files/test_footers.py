"""Footers that claim what cannot be: one reason for the file, and neither memory nor other files' rows pay for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bagel_ds.data.files import footers
from bagel_ds.data.files.filesystems import Unreadable
from bagel_ds.data.files.footers import parquet_layout
from tests.small_data import byte_tokenizer, group, picture, streams_of, t2i_rows, write_parquet

ROWS = 12_345  # a number whose bytes occur in the footer only as this count
FILE, FIRST_COLUMN, SECOND_COLUMN, GROUP = range(4)  # places of the count in the footer


def _varint(number: int) -> bytes:
    """As thrift's compact protocol writes an i64."""
    number = (number << 1) ^ (number >> 63)
    found = b""
    while number >= 128:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def _written(path: Path) -> Path:
    captions = [f'{{"a": "row {row}"}}' for row in range(ROWS)]
    fields = [pa.field("image", pa.binary(), nullable=False), pa.field("captions", pa.string(), nullable=False)]
    table = pa.table({"image": [picture(40, 40)] * ROWS, "captions": captions}, schema=pa.schema(fields))
    pq.write_table(table, path, write_statistics=False, store_schema=False)
    return path


def _claim(path: Path, number: int, *places: int) -> None:
    """Put `number` in these places of the footer where ROWS was."""
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    parts = content[-8 - length : -8].split(_varint(ROWS))
    assert len(parts) == 5, "the count stands in four places"
    footer = parts[0]
    for place, part in enumerate(parts[1:]):
        footer += _varint(number if place in places else ROWS) + part
    path.write_bytes(content[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_a_true_footer_gives_rows_and_columns(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.parquet")
    _claim(path, ROWS, FILE, GROUP)
    rows, names, digest = parquet_layout(str(path))
    assert (rows, names, len(digest)) == ([ROWS], ["image", "captions"], 16)


@pytest.mark.parametrize(
    ("number", "places", "reason"),
    [
        (10**9, (FILE, FIRST_COLUMN, SECOND_COLUMN, GROUP), "claims 1,000,000,000 rows in "),
        (10**9, (FILE, GROUP), "1,000,000,000 rows but 12,345 values of a column"),
        (10**9, (GROUP,), "1,000,000,000 rows but 12,345 values of a column"),
        (10**9, (FILE,), "claims 1,000,000,000 rows, its row groups 12,345"),
        (-5, (FILE, FIRST_COLUMN, SECOND_COLUMN, GROUP), "claims -5 rows"),
        (-5, (GROUP,), "claims -5 rows"),
        (7, (SECOND_COLUMN,), "12,345 rows but 7 values of a column"),
        (7, (GROUP,), "claims 12,345 rows, its row groups 7"),
    ],
)
def test_counts_that_contradict_each_other_or_the_size_cost_the_file_and_no_other(
    tmp_path: Path, number: int, places: tuple[int, ...], reason: str
) -> None:
    (tmp_path / "data").mkdir()
    damaged = _written(tmp_path / "data" / "a.parquet")
    _claim(damaged, number, *places)
    write_parquet(tmp_path / "data" / "b.parquet", t2i_rows(3))
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    (stream,) = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(damaged.parent)})}, tokenizer)
    (bad,) = stream.bad_rows
    assert str(bad.place) == f"data: {damaged} as a whole" and reason in bad.reason
    assert stream.rows == 3
    assert [stream.place(row)[1:] for row in range(3)] == [
        (str(tmp_path / "data" / "b.parquet"), *place) for place in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(plan is not None and stream.read(plan) for plan in (stream.plan_sample(row, 0) for row in range(3)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:4] + content[5_000:], "a column beyond the end of the file"),
        (lambda content: content[:-8] + (2**31).to_bytes(4, "little") + b"PAR1", "footer claims 2,147,483,648 bytes"),
        (lambda content: content[:-1], "must begin and end with PAR1"),
        (lambda content: content[1:], "must begin and end with PAR1"),
        (lambda content: b"PAR1", "must begin and end with PAR1"),
        (lambda content: b"", "must begin and end with PAR1"),
    ],
)
def test_a_footer_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = _written(tmp_path / "a.parquet")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Unreadable, match=reason):
        parquet_layout(str(path))


def test_equal_values_of_many_rows_may_take_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a number of rows that does no harm; above it a file has more bits than rows."""
    path, rows = tmp_path / "a.parquet", 100_000
    pq.write_table(pa.table({"image": pa.nulls(rows)}), path)
    assert path.stat().st_size * 8 < rows
    monkeypatch.setattr(footers, "_ALWAYS_ROWS", rows)
    assert parquet_layout(str(path))[0] == [rows]
    monkeypatch.setattr(footers, "_ALWAYS_ROWS", rows - 1)
    with pytest.raises(Unreadable, match="claims 100,000 rows in"):
        parquet_layout(str(path))


def test_a_value_that_cannot_be_decoded_costs_its_row(tmp_path: Path) -> None:
    """A text column with bytes that are not UTF-8, in the middle of a row group."""
    rows = 6
    captions = pa.array([json.dumps({"a": f"row {row}"}).encode() for row in range(rows)])
    captions = pa.array([b"\xff\xfe" if row == 2 else text.as_py() for row, text in enumerate(captions)])
    text = pa.Array.from_buffers(pa.string(), rows, captions.buffers())
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [picture(40, 40)] * rows, "captions": text}), tmp_path / "data" / "a.parquet")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    (stream,) = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(tmp_path / "data")})}, tokenizer)
    assert [bad.place.row for bad in stream.bad_rows] == [2]
    for row in (3, 5):  # read together: the row between is passed over
        plan = stream.plan_sample(row, 0)
        assert plan is not None
        stream.reader.expect(stream.address(row))
    assert [not isinstance(stream.reader.read(stream.address(row)), ValueError) for row in range(rows)] == [
        row != 2 for row in range(rows)
    ]
