"""Reading rows: how often a row group is read, within which memory, and from which file systems."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.files import filesystems
from bagel_ds.data.files import rows as raw_rows
from bagel_ds.data.files.row_cache import GroupKey, Row, RowCache
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.errors import UserError
from tests.small_data import byte_tokenizer, group, streams_of, t2i_rows, write_parquet

VERSION = ("a", 0, 0)
ROW_BYTES = 1200  # of a row of `_Reader`, as the cache counts it


class _Reader:
    """Row groups of `rows` rows of 1,000 bytes. Notes reads, and the rows whose values are asked for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.reads: Counter[int] = Counter()
        self.taken: list[tuple[int, int]] = []

    def __call__(self, key: GroupKey) -> Iterator[Callable[[], Row]]:
        self.reads[key.group] += 1
        return (partial(self._values, key.group, row) for row in range(self.rows))

    def _values(self, number: int, row: int) -> Row:
        self.taken.append((number, row))
        return {"text": f"{number} {row}".ljust(1000)}


def _group(number: int) -> GroupKey:
    return GroupKey("a", number, ("text",))


def _shuffled(groups: int, rows: int, seed: int = 0) -> list[tuple[int, int]]:
    order = [(number, row) for number in range(groups) for row in range(rows)]
    random.Random(seed).shuffle(order)
    return order


def _run(cache: RowCache, order: list[tuple[int, int]], announced: bool = True) -> int:
    """Ask for all rows of `order`; the most bytes that the cache held."""
    if announced:
        for number, row in order:
            cache.expect(_group(number), row)
    most = 0
    for number, row in order:
        assert cache.row(_group(number), row, VERSION)["text"].split() == [str(number), str(row)]
        most = max(most, cache.bytes)
    return most


def test_a_window_that_fits_is_read_once_per_row_group() -> None:
    reader = _Reader(100)
    cache = RowCache(reader, limit=1000 * ROW_BYTES)
    most = _run(cache, _shuffled(10, 100))
    assert reader.reads == dict.fromkeys(range(10), 1)
    assert most < 1000 * ROW_BYTES and cache.bytes == 0


def test_only_announced_rows_are_kept() -> None:
    reader = _Reader(100)
    cache = RowCache(reader, limit=1000 * ROW_BYTES)
    order = _shuffled(10, 100)[:50]
    most = _run(cache, order)
    assert sorted(reader.taken) == sorted(order)
    assert most <= 50 * ROW_BYTES and set(reader.reads.values()) == {1}


@pytest.mark.parametrize("share", [2, 4])
def test_a_window_n_times_the_memory_is_read_about_n_times(share: int) -> None:
    reader, other = _Reader(100), _Reader(100)
    cache = RowCache(reader, limit=1000 * ROW_BYTES // share)
    most = _run(cache, _shuffled(10, 100))
    assert most <= 1000 * ROW_BYTES // share
    # one more at each end: the first and the last rows of a row group need a read of their own
    assert max(reader.reads.values()) <= share + 2
    _run(RowCache(other, limit=1000 * ROW_BYTES // share), _shuffled(10, 100), announced=False)
    assert other.reads.total() > 3 * reader.reads.total()


@pytest.mark.parametrize("limit", [0, 10 * ROW_BYTES, 1000 * ROW_BYTES])
def test_rows_in_file_order_need_no_announcement(limit: int) -> None:
    reader = _Reader(100)
    cache = RowCache(reader, limit)
    _run(cache, [(number, row) for number in range(3) for row in range(100)], announced=False)
    kept = max(limit // ROW_BYTES, 1)
    assert all(100 / kept - 1 <= reads <= 100 / kept * 1.3 + 1 for reads in reader.reads.values())
    assert cache.bytes <= limit


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.booleans())), st.integers(0, 12))
def test_any_order_gives_the_right_rows_within_the_limit(asked: list[tuple[int, int, bool]], rows: int) -> None:
    cache = RowCache(_Reader(5), rows * ROW_BYTES)
    for number, row, announced in asked:
        if announced:
            cache.expect(_group(number), row)
    for number, row, _ in asked:
        assert cache.row(_group(number), row, VERSION)["text"].split() == [str(number), str(row)]
        assert 0 <= cache.bytes <= rows * ROW_BYTES
        assert cache.bytes == sum(kept.size for kept in cache._kept.values())


def test_a_replaced_file_is_read_again_and_a_missing_row_is_an_error() -> None:
    reader = _Reader(5)
    cache = RowCache(reader, 100 * ROW_BYTES)
    for version in (("a", 0, 0), ("a", 0, 0), ("a", 0, 1)):
        cache.row(_group(0), 1, version)
    assert reader.reads[0] == 2
    with pytest.raises(IndexError, match="no row 5"):
        cache.row(_group(0), 5, VERSION)


def test_streams_announce_rows_and_each_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(30), group_rows=10)
    streams = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")})}, tokenizer)
    plans = [plan for row in range(30) if (plan := streams[0].plan_sample(row, 0))]
    random.Random(0).shuffle(plans)
    raw_rows.forget_open_files()
    reads: Counter[int] = Counter()
    batches_of = raw_rows._batches

    def noted(path: str, number: int, columns: Any) -> Any:
        reads[number] += 1
        return batches_of(path, number, columns)

    monkeypatch.setattr(raw_rows, "_batches", noted)
    for plan in plans:
        streams[0].reader.expect(streams[0].address(plan.row))
    batches = [materialize([plan], streams, tokenizer, LayoutOptions(), 0) for plan in plans]
    assert not any(batch.skipped for batch in batches)
    assert reads == {0: 1, 1: 1, 2: 1}
    assert raw_rows.rows.bytes == 0


def test_batches_of_large_rows_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"x": bytes([i]) * 1000} for i in range(64)], group_rows=64)
    assert [batch.num_rows for batch in raw_rows._batches(str(path), 0, ["x"])] == [64]
    size = raw_rows.open_parquet(str(path)).metadata.row_group(0).total_byte_size
    monkeypatch.setattr(raw_rows, "_BATCH_BYTES", size // 8)
    batches = [batch.num_rows for batch in raw_rows._batches(str(path), 0, ["x"])]
    assert max(batches) <= 8 and sum(batches) == 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "t2i" / "b.parquet", t2i_rows(2))
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(3, first=2))
    (tmp_path / "t2i" / ".hidden.parquet").write_bytes(b"")
    (tmp_path / "t2i" / "notes.txt").write_bytes(b"")
    (tmp_path / "t2i" / "folder.parquet").mkdir()
    raw_rows.forget_open_files()
    return tmp_path


def _loaded(folder: Path, paths: dict[str, Any]) -> list[list[int]]:
    """Pixels of the first rows of a data set."""
    tokenizer = byte_tokenizer(folder / "tokenizer")
    streams = streams_of(folder, {"t2i_pretrain": group(paths)}, tokenizer)
    plans = [plan for row in range(streams[0].rows) if (plan := streams[0].plan_sample(row, 0))]
    batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert not batch.skipped
    return [image.flatten().tolist() for image in batch.images]


def test_a_file_uri_is_the_local_folder(folder: Path) -> None:
    local = _loaded(folder, {"data_dir": str(folder / "t2i")})
    assert len(local) == 5
    assert _loaded(folder, {"data_dir": (folder / "t2i").as_uri()}) == local
    assert _loaded(folder, {"data_dir": (folder / "t2i").as_uri(), "parquet": ["a.parquet"]}) == local[:3]
    assert _loaded(folder, {"data_dir": (folder / "t2i" / "b.parquet").as_uri()}) == local[3:]


@pytest.mark.parametrize("uri", ["mock://host/bucket/t2i", "mock://host/bucket/t2i/?endpoint=x"])
def test_any_filesystem_of_pyarrow_can_hold_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """A stand-in for hdfs, s3 and gs: whatever from_uri makes of the folder's URI is used, once per process."""
    asked: list[str] = []

    class FileSystem:
        @staticmethod
        def from_uri(asked_for: str) -> tuple[fs.FileSystem, str]:
            asked.append(asked_for)
            path = asked_for.partition("?")[0].removeprefix("mock://host/bucket").strip("/")
            return fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), path

    local = _loaded(folder, {"data_dir": str(folder / "t2i")})
    monkeypatch.setattr(filesystems.fs, "FileSystem", FileSystem)
    assert _loaded(folder, {"data_dir": uri}) == local
    assert len(asked) <= 2 and all(("?endpoint=x" in uri) == ("?endpoint=x" in one) for one in asked)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"data_dir": "file:///no/such/folder"}, "data_dir does not exist: file:///no/such/folder"),
        ({"data_dir": "nowhere://bucket/folder"}, "data_dir nowhere://bucket/folder cannot be opened"),
        ({"data_dir": "{folder}", "parquet": "c.parquet"}, "no such parquet file: .*c.parquet"),
    ],
)
def test_a_uri_that_cannot_be_used_is_one_message(folder: Path, paths: dict[str, Any], message: str) -> None:
    paths = {key: value.replace("{folder}", (folder / "t2i").as_uri()) for key, value in paths.items()}
    with pytest.raises(UserError, match=message):
        _loaded(folder, paths)


def test_conversations_must_be_local(folder: Path) -> None:
    paths = {"data_dir": folder.as_uri(), "jsonl_path": (folder / "a.jsonl").as_uri()}
    with pytest.raises(UserError, match="must be local paths"):
        streams_of(folder, {"vlm_sft": group(paths)}, byte_tokenizer(folder / "tokenizer"))
