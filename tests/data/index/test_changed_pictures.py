"""The index of lines that name pictures: what is added, replaced or overwritten later is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats import SOURCES
from bagel_ds.data.index import data_file, records
from bagel_ds.data.index import index as index_module
from bagel_ds.data.index.data_file import read_tasks
from bagel_ds.data.index.index import DataFile, DataIndex, FileIndex, index_files
from bagel_ds.data.index.records import Chunk, TaskIndexer
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import (
    byte_tokenizer,
    conversation,
    group,
    picture,
    streams_of,
    t2i_rows,
    write_conversations,
    write_parquet,
)

NAMES = ("a.png", "sub/b.png", "missing.png", "nowhere/c.png")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first text of each row that is indexed."""
    found: list[str] = []
    original: Callable[..., Any] = records.encode_record

    def noted(row: Any, tokenizer: Tokenizer) -> Any:
        found.append(row.texts[0])
        return original(row, tokenizer)

    monkeypatch.setattr(records, "encode_record", noted)
    return found


@pytest.fixture
def talks(tmp_path: Path) -> DataFile:
    """A line for each of NAMES; the last two files don't exist."""
    lines = [conversation(f"<image>{name}", "a thing", image=name) for name in NAMES]
    lines += [conversation("no picture", "a thing")]
    (tmp_path / "images" / "sub").mkdir(parents=True)
    paths = write_conversations(tmp_path, lines, {name: picture(40, 40) for name in NAMES[:2]})
    return DataFile(paths["jsonl_path"], SOURCES["vlm"], ImageFolder(paths["data_dir"]))


def _opened(file: DataFile, tokenizer: Tokenizer, folder: Path) -> FileIndex:
    (index,) = index_files([file], tokenizer, str(folder / "cache"))
    return index


def _sizes(index: FileIndex) -> list[Any]:
    found = [index.records.record(row) for row in range(4)]
    return [list(record.image_sizes) if record is not None else "bad" for record in found]


def _replace(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    path.with_name("new").rename(path)


def test_nothing_is_indexed_again_where_nothing_changed(
    tmp_path: Path, tokenizer: Tokenizer, talks: DataFile, encoded: list[str]
) -> None:
    first = _opened(talks, tokenizer, tmp_path)
    count = len(encoded)
    again = _opened(talks, tokenizer, tmp_path)
    assert len(encoded) == count and _sizes(again) == _sizes(first) == [[(40, 40)], [(40, 40)], "bad", "bad"]
    assert [row for row, _ in again.bad] == [2, 3]


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda images: (images / "missing.png").write_bytes(picture(60, 50)), 2),
        (lambda images: ((images / "nowhere").mkdir(), (images / "nowhere/c.png").write_bytes(picture(60, 50))), 3),
        (lambda images: _replace(images / "a.png", picture(60, 50)), 0),
        (lambda images: _replace(images / "sub" / "b.png", picture(60, 50)), 1),
    ],
    ids=["added", "added with its folder", "replaced", "replaced further down"],
)
def test_only_a_row_whose_picture_changed_is_indexed_again(
    tmp_path: Path,
    tokenizer: Tokenizer,
    talks: DataFile,
    encoded: list[str],
    change: Callable[[Path], Any],
    row: int,
) -> None:
    before = _sizes(_opened(talks, tokenizer, tmp_path))
    encoded.clear()
    change(tmp_path / "images")
    after = _opened(talks, tokenizer, tmp_path)
    before[row] = [(60, 50)]
    assert _sizes(after) == before
    assert [bad for bad, _ in after.bad] == [bad for bad in (2, 3) if bad != row]
    assert encoded == [NAMES[row]]
    _opened(talks, tokenizer, tmp_path)
    assert len(encoded) == 1, "the new index is kept"


def test_a_picture_that_vanished_makes_its_row_unusable(tmp_path: Path, tokenizer: Tokenizer, talks: DataFile) -> None:
    _opened(talks, tokenizer, tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    after = _opened(talks, tokenizer, tmp_path)
    assert _sizes(after)[:2] == ["bad", [(40, 40)]] and "no such file" in dict(after.bad)[0]


def test_rows_in_several_tasks_and_processes_are_told_apart(
    tmp_path: Path, tokenizer: Tokenizer, talks: DataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "UNIT_LINES", 2)
    monkeypatch.setattr(data_file, "_TASK_ROWS", 2)
    monkeypatch.setattr(index_module, "_POOL_ROWS", 0)
    _opened(talks, tokenizer, tmp_path)
    (tmp_path / "images" / "missing.png").write_bytes(picture(60, 50))
    (index,) = index_files([talks], tokenizer, str(tmp_path / "cache"), workers=2)
    assert _sizes(index) == [[(40, 40)], [(40, 40)], [(60, 50)], "bad"]
    assert index.records.record(4) is not None and [row for row, _ in index.bad] == [3]


def test_a_second_process_takes_what_the_first_has_indexed_again(
    tmp_path: Path, tokenizer: Tokenizer, talks: DataFile, encoded: list[str]
) -> None:
    _opened(talks, tokenizer, tmp_path)
    (tmp_path / "images" / "missing.png").write_bytes(picture(60, 50))
    one, other = (DataIndex([talks], tokenizer, str(tmp_path / "cache")) for _ in range(2))
    assert one.missing() == other.missing() == [talks]
    one.complete()
    encoded.clear()
    other.complete()
    assert not encoded and _sizes(other.indexes[talks])[2] == [(60, 50)]


def _chunks(index: FileIndex, tokenizer: Tokenizer) -> list[Chunk]:
    """As `bagel-ds check` makes them while it reads every row."""
    indexers = [TaskIndexer(task, tokenizer) for task in read_tasks(index.file, index.layout)]
    for indexer in indexers:
        for _ in indexer.rows():
            pass
    return [indexer.chunk() for indexer in indexers]


def test_a_picture_overwritten_in_place_is_skipped_until_the_index_is_repaired(
    tmp_path: Path, tokenizer: Tokenizer, talks: DataFile
) -> None:
    """No folder shows it: the worker that meets the picture says so, and a full pass over the rows repairs it."""
    folder = tmp_path / "images"
    paths = {"data_dir": str(folder), "jsonl_path": talks.path}
    (stream,) = streams_of(tmp_path, {"vlm_sft": group(paths)}, tokenizer)
    (folder / "a.png").write_bytes(picture(80, 30))
    plan = stream.plan_sample(0, 0)
    assert plan is not None
    batch = materialize([plan], [stream], tokenizer, LayoutOptions(), 0)
    ((_, reason),) = batch.skipped
    assert "80 x 30 pixels" in reason and "changed since it was indexed" in reason
    index = stream.uses[0].index
    assert index.repair(_chunks(index, tokenizer)) == [0]
    assert index.repair(_chunks(index, tokenizer)) == []
    for repaired in (stream, streams_of(tmp_path, {"vlm_sft": group(paths)}, tokenizer)[0]):
        plan = repaired.plan_sample(0, 0)
        assert plan is not None
        assert not materialize([plan], [repaired], tokenizer, LayoutOptions(), 0).skipped


def test_repair_names_rows_that_became_usable_or_unusable(
    tmp_path: Path, tokenizer: Tokenizer, talks: DataFile
) -> None:
    index = _opened(talks, tokenizer, tmp_path)
    (tmp_path / "images" / "missing.png").write_bytes(picture(60, 50))
    (tmp_path / "images" / "sub" / "b.png").write_bytes(b"no picture any more")
    assert index.repair(_chunks(index, tokenizer)) == [1, 2]
    assert [row for row, _ in index.bad] == [1, 3]
    assert _sizes(_opened(talks, tokenizer, tmp_path)) == [[(40, 40)], "bad", [(60, 50)], "bad"]


def test_repair_refuses_a_data_file_that_changed_itself(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_parquet(tmp_path / "a.parquet", t2i_rows(2))
    index = _opened(DataFile(str(path), SOURCES["t2i"]), tokenizer, tmp_path)
    chunks = _chunks(index, tokenizer)
    assert index.repair(chunks) == []
    write_parquet(path, t2i_rows(3))
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match="changed while it was in use"):
        index.repair(chunks)
