"""Rows that cannot be used: counted once, at the cost of what is new."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagel_ds.data.streams.opening import _stated_groups
from bagel_ds.data.streams.row_sets import RowSet
from bagel_ds.data.streams.stream import GroupStream
from tests.small_data import byte_tokenizer, group, streams_of, t2i_rows, write_parquet


@given(st.lists(st.integers(0, 99)))
def test_a_row_set_is_a_set(rows: list[int]) -> None:
    found, expected = RowSet(100), set[int]()
    for row in rows:
        assert found.add(row) == (row not in expected)
        expected.add(row)
    assert list(found) == sorted(expected) and len(found) == len(expected)
    assert all((row in found) == (row in expected) for row in range(100))


def _stream(folder: Path, repeated: int = 1) -> GroupStream:
    """Two files of 10 rows: 7 are bad in the index, the caption of the last is too long."""
    for name in "ab":
        captions = ('{"a": "short"}', '{"a": "also short"}', f'{{"a": "{"long " * 100}"}}')
        good = [{**row, "captions": text} for row, text in zip(t2i_rows(3), captions, strict=True)]
        rows = [{"image": b"", "captions": "{}"}] * 7 + good
        write_parquet(folder / "t2i" / f"{name}.parquet", rows, group_rows=5)
    groups = {"t2i_pretrain": group({"data_dir": str(folder / "t2i")}, num_used_data=[2 * repeated])}
    return streams_of(folder, groups, byte_tokenizer(folder / "tokenizer"), max_num_tokens_per_sample=300)[0]


@pytest.mark.parametrize("repeated", [1, 3])
def test_a_row_counts_once_however_often_its_file_is_used(tmp_path: Path, repeated: int) -> None:
    stream = _stream(tmp_path, repeated)
    assert stream.rows == 20 * repeated
    for epoch in range(2):
        planned = [stream.plan_sample(row, epoch) is not None for row in range(stream.rows)]
        assert planned.count(True) == 4 * repeated
        assert len(stream.bad_rows) == len(stream.unusable) == 14 and list(stream.too_long) == [9, 19]
        assert stream.unusable.counts() == {"data": 16}


def test_counting_looks_only_at_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _stream(tmp_path)
    for row in range(stream.rows):
        stream.plan_sample(row, 0)
    before = stream.unusable.counts()
    monkeypatch.setattr(stream.unusable, "_place", lambda row: pytest.fail("a row was looked at again"))
    monkeypatch.setattr(stream.unusable, "_at", lambda *bad: pytest.fail("a reason was looked at again"))
    assert stream.unusable.counts() == before and len(stream.unusable) == 14


def test_the_log_names_the_first_rows_and_counts_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        stream = _stream(tmp_path)
        assert caplog.text.count("is skipped: the image has zero bytes") == 5
        assert "data: 9 more rows are skipped" in caplog.text
        caplog.clear()
        for row in (3, 3, 5):
            stream.unusable.refuse(row, "no loss")
        stream.unusable.counts()
        stream.unusable.counts()
    assert caplog.text.count("data: 2 more rows are skipped") == 1 and "is skipped:" not in caplog.text
    assert [row.reason for row in stream.bad_rows[-2:]] == ["no loss"] * 2


def test_parquet_info_is_looked_through_once_for_all_files() -> None:
    class Info(dict[str, object]):
        looked_through = 0

        def items(self) -> object:  # type: ignore[override]
            self.looked_through += 1
            return super().items()

    paths = [f"/data/{number}.parquet" for number in range(50)]
    info = Info({path.replace("/data", "/elsewhere"): {"num_row_groups": 3} for path in paths})
    assert _stated_groups(info, paths) == dict.fromkeys(paths, 3)
    assert info.looked_through == 1
