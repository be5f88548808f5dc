"""Files that are not regular, also those that take a data file's place during a run, and names of any bytes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.files.filesystems import Unreadable, regular_status, shown
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats import SOURCES
from bagel_ds.data.index.index import DataFile, index_files
from bagel_ds.data.samples.image_tokens import LayoutOptions
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


def _make_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


ODD: dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to gone": lambda path: path.symlink_to("gone"),
    "No such file": lambda path: None,
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_a_regular_file_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / "x")
    with pytest.raises(Unreadable, match=f"^{kind}"):
        regular_status(tmp_path / "x")


@pytest.mark.parametrize("kind", ODD)
def test_as_parquet_it_is_one_reason_and_the_next_file_is_used(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", t2i_rows(2))
    files = [DataFile(str(tmp_path / f"{name}.parquet"), SOURCES["t2i"]) for name in "ab"]
    odd, fine = index_files(files, byte_tokenizer(tmp_path / "tokenizer"), str(tmp_path / "cache"))
    assert [(row, reason.startswith(kind)) for row, reason in odd.bad] == [(-1, True)]
    assert fine.rows == 2 and not fine.bad


@pytest.mark.parametrize("kind", ODD)
def test_what_takes_a_data_files_place_during_a_run_costs_its_own_samples(tmp_path: Path, kind: str) -> None:
    """A worker neither waits for a pipe nor goes down with the file."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    for name in "ab":
        write_parquet(tmp_path / "t2i" / f"{name}.parquet", t2i_rows(2))
    talks = write_conversations(tmp_path / "vlm", [conversation("hello", "good day")])
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}), "vlm_sft": group(talks)}
    streams = streams_of(tmp_path, groups, tokenizer)
    plans = [plan for row in range(4) if (plan := streams[0].plan_sample(row, 0))]
    plans += [plan for row in range(1) if (plan := streams[1].plan_sample(row, 0))]
    materialize(plans, streams, tokenizer, LayoutOptions(), 0)  # the files are open
    for path in (tmp_path / "t2i" / "a.parquet", Path(talks["jsonl_path"])):
        path.unlink()
        ODD[kind](path)
    batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert len(plans) == 5 and len(batch.samples) == 2
    assert len(batch.skipped) == 3 and all(kind in reason for _, reason in batch.skipped)


def _parquet_at(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Arrow writes to names of UTF-8 only."""
    path.parent.mkdir(exist_ok=True)
    return write_parquet(path.parent.parent / "written.parquet", rows).rename(path)


NAMES = {"Chinese": ("数据" * 40).encode(), "not UTF-8": b"caf\xe9 \xff\xfe" * 10, "only bad bytes": b"\xff" * 50}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["beside the data", "in a cache folder"])
def test_data_files_of_any_name_are_indexed_once_and_read(tmp_path: Path, name: str, where: str) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"d\xe9 " + NAMES[name][:60])))
    parquet = _parquet_at(folder / os.fsdecode(NAMES[name] + b".parquet"), t2i_rows(2))
    lines = folder / os.fsdecode(NAMES[name] + b".jsonl")
    lines.write_text(json.dumps(conversation("<image> what?", "a thing", image="x.png")) + "\n{\n")
    (folder / "x.png").write_bytes(picture(40, 40))
    files = [DataFile(str(parquet), SOURCES["t2i"]), DataFile(str(lines), SOURCES["vlm"], ImageFolder(str(folder)))]
    cache = None if where == "beside the data" else str(tmp_path / "cache")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    first = index_files(files, tokenizer, cache)
    assert [index.is_kept for index in first] == [True, True]
    entries = list((folder / ".bagel_ds_index" if cache is None else Path(cache)).glob("*.safetensors"))
    assert len(entries) == 2 and all(len(os.fsencode(entry.name)) < 200 for entry in entries)
    assert [(index.rows, [row for row, _ in index.bad]) for index in first] == [(2, []), (2, [1])]
    again = index_files(files, tokenizer, cache)
    assert [index.records.numbers.tolist() for index in again] == [index.records.numbers.tolist() for index in first]


def test_rows_of_files_of_any_name_are_planned_made_and_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    for name in NAMES.values():
        rows = [*t2i_rows(2), {"image": b"", "captions": "{}"}]
        _parquet_at(tmp_path / "t2i" / os.fsdecode(name + b".parquet"), rows)
    streams = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")})}, tokenizer)
    plans = [plan for row in range(streams[0].rows) if (plan := streams[0].plan_sample(row, 0))]
    batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert len(batch.samples) == 6 and not batch.skipped
    for text in (*batch.samples, *(str(bad.place) for bad in streams[0].bad_rows)):
        text.encode()  # any log and any stream can take it
    assert any("caf\\xe9 \\xff\\xfe" in text for text in batch.samples)


def test_a_name_is_shown_as_it_is_where_it_can_be() -> None:
    assert shown("数据/a b.parquet") == "数据/a b.parquet"
    assert shown(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
