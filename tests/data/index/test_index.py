"""The index: what it says of rows, when it is kept, when it is made again, and what it survives."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats import SOURCES
from bagel_ds.data.formats.record import Record
from bagel_ds.data.index import cache as cache_module
from bagel_ds.data.index import data_file
from bagel_ds.data.index import index as index_module
from bagel_ds.data.index.cache import BESIDE_DATA, locked
from bagel_ds.data.index.index import DataFile, FileIndex, index_files
from bagel_ds.data.index.records import FileRecords, differing
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import (
    INTERLEAVE_SCHEMA,
    SPECIAL,
    byte_tokenizer,
    conversation,
    edit_rows,
    interleave_row,
    picture,
    t2i_rows,
    write_conversations,
    write_parquet,
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, one per task."""
    read: list[str] = []
    original: Callable[..., Any] = index_module._index_chunk

    def noted(tokenizer: Tokenizer, task: Any) -> Any:
        read.append(os.path.basename(task.read.file.path))
        return original(tokenizer, task)

    monkeypatch.setattr(index_module, "_index_chunk", noted)
    return read


def _t2i(path: Path) -> DataFile:
    return DataFile(str(path), SOURCES["t2i"])


def _record(index: FileIndex, row: int) -> Record:
    record = index.records.record(row)
    assert record is not None
    return record


def test_records_hold_token_lengths_and_image_sizes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(5), group_rows=2)
    (index,) = index_files([_t2i(path)], tokenizer, str(tmp_path / "cache"))
    assert index.layout.unit_rows.tolist() == [2, 2, 1]
    assert index.rows == 5 and not index.bad
    for row in range(5):
        texts = [f"picture {row}", f"a longer caption of picture number {row}"]
        assert _record(index, row) == Record([], [len(text) for text in texts], [(40 + 7 * row, 50 + 3 * row)])


def test_each_unusable_row_is_named_once_with_its_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = t2i_rows(1)[0]
    schema = pa.schema([("image", pa.binary()), ("captions", pa.string())])
    rows = [
        {**good, "image": None},
        good,
        {**good, "image": b""},
        {**good, "image": b"no image"},
        {**good, "captions": None},
        {**good, "captions": "{"},
        {**good, "captions": '{"a": 3}'},
        {**good, "captions": "[]"},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows, 3, schema)
    (index,) = index_files([_t2i(path)], tokenizer, str(tmp_path / "cache"))
    reasons = dict(index.bad)
    assert list(reasons) == [0, 2, 3, 4, 5, 6]
    expected = [
        "no image bytes",
        "zero bytes",
        "unknown format",
        "no caption",
        "not valid JSON",
        "none of the captions",
    ]
    for reason, part in zip(reasons.values(), expected, strict=True):
        assert part in reason
    assert np.diff(index.records.offsets)[[0, 2, 3, 4, 5, 6]].tolist() == [0] * 6
    assert _record(index, 7).text_lengths == [1]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"picture": b"x", "captions": "{}"}], "columns image are missing; the file has picture, captions"),
        ([{"image": "text", "captions": "{}"}], "expected the bytes of an image file"),
        ([{"image": 3, "captions": "{}"}], "image is 3, expected the bytes"),
    ],
)
def test_wrong_columns_are_a_reason_not_a_crash(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], reason: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows)
    (index,) = index_files([_t2i(path)], tokenizer, str(tmp_path / "cache"))
    assert [reason in text for _, text in index.bad] == [True]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 100])
def test_a_damaged_file_is_reported_as_a_whole(tmp_path: Path, tokenizer: Tokenizer, content: bytes) -> None:
    damaged = tmp_path / "a.parquet"
    damaged.write_bytes(content)
    fine = write_parquet(tmp_path / "b.parquet", t2i_rows(1))
    first, second = index_files([_t2i(damaged), _t2i(fine)], tokenizer, str(tmp_path / "cache"))
    assert first.rows == 0 and [row for row, _ in first.bad] == [-1]
    assert second.rows == 1 and not second.bad


def test_a_damaged_row_group_leaves_the_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(6), group_rows=2)
    with pq.ParquetFile(path) as file:
        offsets = [file.metadata.row_group(1).column(i).data_page_offset for i in range(2)]
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    (index,) = index_files([_t2i(path)], tokenizer, str(tmp_path / "cache"))
    assert [row for row, _ in index.bad] == [2, 3]
    assert all("row group cannot be read" in reason for _, reason in index.bad)
    assert _record(index, 5).image_sizes == [(75, 65)]


def test_an_empty_file_has_no_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    schema = pa.schema([("image", pa.binary()), ("captions", pa.string())])
    path = write_parquet(tmp_path / "a.parquet", [], schema=schema)
    lines = write_conversations(tmp_path, [])
    talks = DataFile(lines["jsonl_path"], SOURCES["vlm"], ImageFolder(lines["data_dir"]))
    assert [index.rows for index in index_files([_t2i(path), talks], tokenizer, str(tmp_path / "cache"))] == [0, 0]


def test_a_second_run_reads_only_what_changed(tmp_path: Path, tokenizer: Tokenizer, reads: list[str]) -> None:
    paths = [write_parquet(tmp_path / f"{name}.parquet", t2i_rows(2)) for name in "abc"]
    data_files = [_t2i(path) for path in paths]
    cache = str(tmp_path / "cache")
    first = index_files(data_files, tokenizer, cache)
    assert reads == ["a.parquet", "b.parquet", "c.parquet"]
    again = index_files(data_files, tokenizer, cache)
    assert len(reads) == 3
    for one, other in zip(first, again, strict=True):
        assert differing(one.records, other.records) == []
        assert (one.digest, one.layout.columns) == (other.digest, other.layout.columns)
    write_parquet(paths[1], t2i_rows(3))
    changed = index_files(data_files, tokenizer, cache)
    assert reads[3:] == ["b.parquet"]
    assert [index.rows for index in changed] == [2, 3, 2]
    index_files(data_files, byte_tokenizer(tmp_path / "other", ("<|x|>", *SPECIAL)), cache)
    assert len(reads) == 7


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path, tokenizer: Tokenizer, reads: list[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    index_files([_t2i(path)], tokenizer)
    (entry,) = (tmp_path / BESIDE_DATA).glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:50])
    (index,) = index_files([_t2i(path)], tokenizer)
    assert len(reads) == 2 and index.rows == 2


def test_the_index_goes_home_when_the_data_folder_cannot_be_written(
    tmp_path: Path, tokenizer: Tokenizer, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    (tmp_path / BESIDE_DATA).write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        index_files([_t2i(path)], tokenizer)
    assert len(reads) == 1
    assert len(list((tmp_path / "home" / "bagel_ds").glob("*.safetensors"))) == 1


def test_a_file_used_twice_is_read_once(tmp_path: Path, tokenizer: Tokenizer, reads: list[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    first, second = index_files([_t2i(path), _t2i(path)], tokenizer, str(tmp_path / "cache"))
    assert first is second and len(reads) == 1


def test_the_pool_gives_what_one_process_gives(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "_TASK_ROWS", 2)
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(6) + [{"image": b"", "captions": "{}"}], group_rows=1)
    lines = write_conversations(tmp_path / "talks", [conversation(f"line {i}", "answer") for i in range(5)] + ["{"])
    talks = DataFile(lines["jsonl_path"], SOURCES["vlm"], ImageFolder(lines["data_dir"]))
    monkeypatch.setattr(data_file, "UNIT_LINES", 2)
    alone = index_files([_t2i(path), talks], tokenizer, str(tmp_path / "one"), workers=1)
    monkeypatch.setattr(index_module, "_POOL_ROWS", 0)
    pooled = index_files([_t2i(path), talks], tokenizer, str(tmp_path / "many"), workers=2)
    for one, other in zip(alone, pooled, strict=True):
        assert differing(one.records, other.records) == []
        assert one.digest == other.digest
    assert [row for row, _ in alone[0].bad] == [6] and [row for row, _ in alone[1].bad] == [5]


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_lines_are_chosen_as_the_original_chooses_them(tmp_path: Path, tokenizer: Tokenizer, seed: int | None) -> None:
    count, used = 40, 7
    lines = write_conversations(tmp_path, [conversation("q" * (i + 1), "a") for i in range(count)])
    chosen = list(range(count))
    if seed is not None:
        random.Random(seed).shuffle(chosen)
    expected = sorted(chosen[:used])
    file = DataFile(lines["jsonl_path"], SOURCES["vlm"], ImageFolder(lines["data_dir"]), used, seed)
    (index,) = index_files([file], tokenizer, str(tmp_path / "cache"))
    assert [_record(index, row).text_lengths[0] - 1 for row in range(index.rows)] == expected
    assert (index.layout.places[:, 2] - 1).tolist() == expected
    (everything,) = index_files([replace(file, lines=None)], tokenizer, str(tmp_path / "cache"))
    assert everything.rows == count


def test_bad_lines_and_pictures_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        conversation("<image>", "fine", image="x.png"),
        conversation("<image>", "absent", image="y.png"),
        conversation("<image>", "outside", image="../x.png"),
        conversation("<image>", "absolute", image="/x.png"),
        conversation("<image>", "not a name", image=7),
        conversation("<image><image>", "too many tags", image="x.png"),
        conversation("<image>", "tag in a later turn", "<image>", "again", image=["x.png"]),
        conversation("nothing to learn"),
        {**conversation("<video>", "moving"), "video": "x.mp4"},
        {"id": 3},
        {"conversations": [{"from": "gpt", "value": float("nan")}]},
        "[1]",
        "{broken",
        "",
        {"conversations": [{"from": "gpt", "value": "\ud800"}]},
        conversation("a picture that no turn shows", "fine", image="x.png"),
    ]
    paths = write_conversations(tmp_path, lines, {"x.png": picture(8, 8)})
    file = DataFile(paths["jsonl_path"], SOURCES["vlm"], ImageFolder(paths["data_dir"]))
    (index,) = index_files([file], tokenizer, str(tmp_path / "cache"))
    reasons = dict(index.bad)
    expected = {
        1: "no such file",
        2: "leaves the image folder",
        3: "leaves the image folder",
        4: "image is 7",
        5: "<image> 2 times, the row has 1 images",
        6: "<image> 2 times, the row has 1 images",
        7: "nothing to learn",
        8: "no such file",
        9: "the row has no conversations",
        10: "the value of turn 0 is nan, expected text",
        11: "expected a JSON object",
        12: "not valid JSON",
        13: "not valid Unicode",
    }
    assert reasons.keys() == expected.keys()
    for row, part in expected.items():
        assert part in reasons[row], reasons[row]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_list": [picture(8, 8)]}, "holds 1 images"),
        ({"instruction_list": []}, "need 1 items in instruction_list, found 0"),
        ({"instruction_list": [[]]}, "at least one text"),
        ({"instruction_list": [[None]]}, "at least one text"),
        ({"image_list": [picture(8, 8), b"broken"]}, "unknown format"),
        ({"image_list": None}, "expected a list"),
        ({"image_list": [None, None]}, "no image bytes"),
    ],
)
def test_unusable_edit_rows(tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any], reason: str) -> None:
    schema = pa.schema([("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))])
    path = write_parquet(tmp_path / "a.parquet", [edit_rows(1)[0], {**edit_rows(1)[0], **change}], schema=schema)
    (index,) = index_files([DataFile(str(path), SOURCES["edit"])], tokenizer, str(tmp_path / "cache"))
    assert [(row, reason in text) for row, text in index.bad] == [(1, True)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (interleave_row(["q"], ["s"], answer=""), "answer is empty"),
        ({**interleave_row(["q"], ["s"]), "answer": None}, "answer is empty"),
        (interleave_row([], ["s"]), "question_interleave is empty"),
        (interleave_row(["q"], []), "solution_interleave is empty"),
        (
            {**interleave_row(["q", 0], ["s"]), "question_images": []},
            "question_interleave[1] has index 0, but question_images has 0 images",
        ),
        (interleave_row(["q"], [-1]), "has index -1, but solution_images has 0 images"),
        (
            {**interleave_row(["q"], ["s"]), "solution_interleave": [{"type": "image", "content": "", "index": None}]},
            "image without an index",
        ),
        ({**interleave_row(["q"], ["s"]), "solution_interleave": [{"type": "sound"}]}, "type 'sound'"),
    ],
)
def test_unusable_interleaved_rows(tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], reason: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row, interleave_row(["q"], ["s"])], schema=INTERLEAVE_SCHEMA)
    (index,) = index_files([DataFile(str(path), SOURCES["interleave"])], tokenizer, str(tmp_path / "cache"))
    assert [(bad, reason in text) for bad, text in index.bad] == [(0, True)]


def test_of_two_at_a_time_one_indexes_and_the_other_waits(
    tmp_path: Path, tokenizer: Tokenizer, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    cache = tmp_path / "cache"
    cache.mkdir()
    with caplog.at_level(logging.INFO, "bagel_ds"), ThreadPoolExecutor(2) as pool:
        with locked([cache]):
            waiting = [pool.submit(index_files, [_t2i(path)], tokenizer, str(cache)) for _ in range(2)]
            while sum("waiting for it" in record.getMessage() for record in caplog.records) < 2:
                assert not any(future.done() for future in waiting)
                time.sleep(0.01)
        assert [future.result()[0].rows for future in waiting] == [2, 2]
    assert reads == ["a.parquet"]


def test_of_two_processes_over_many_files_each_file_is_indexed_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The second comes while the first is in the middle: it takes what is there and makes nothing again."""
    paths = [write_parquet(tmp_path / f"{number:02}.parquet", t2i_rows(40)) for number in range(40)]
    files, cache = [_t2i(path) for path in paths], str(tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        made = [pool.submit(_files_made, files, tokenizer, cache) for _ in range(2)]
        counts = [future.result(120) for future in made]
    assert sum(counts) == len(files), counts


def _files_made(data_files: list[DataFile], tokenizer: Tokenizer, cache: str) -> int:
    made: list[DataFile] = []
    original = FileIndex.set

    def noted(self: FileIndex, records: FileRecords) -> None:
        made.append(self.file)
        original(self, records)

    with mock.patch.object(FileIndex, "set", noted):
        index_files(data_files, tokenizer, cache)
    return len(made)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    cache = tmp_path / "cache"
    cache.mkdir()
    entry = cache_module.cache_file(cache, str(tmp_path / "gone.parquet"), "key")
    old, new = (entry.with_name(f"{entry.name}.{process}.tmp") for process in (1, 2))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    index_files([_t2i(path)], tokenizer, str(cache))
    assert not old.exists() and new.exists(), "another process may be writing the new one"


def test_a_file_that_is_gone_is_reported_as_a_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    fine = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    here, gone = index_files([_t2i(fine), _t2i(tmp_path / "b.parquet")], tokenizer, str(tmp_path / "cache"))
    assert here.rows == 2 and gone.rows == 0
    assert [row for row, _ in gone.bad] == [-1] and "No such file" in dict(gone.bad)[-1]


def test_a_sweep_removes_what_we_left_half_written_and_nothing_else(tmp_path: Path) -> None:
    entry = cache_module.cache_file(tmp_path, "data/a.b-c.parquet", "key")
    ours = [entry.with_name(f"{entry.name}.{process}.tmp") for process in (1, 23456)]
    names = ["results.tmp", "a.safetensors.7.tmp", f"{entry.name}.tmp", f"{entry.name}.x.tmp", entry.name]
    others = [tmp_path / name for name in names]
    for path in (*ours, *others):
        path.touch()
        os.utime(path, (0, 0))
    young = entry.with_name(f"{entry.name}.3.tmp")
    young.touch()
    cache_module.sweep([tmp_path])
    assert sorted(tmp_path.iterdir()) == sorted([*others, young])
