"""Index files: mapped and shared, never misread, whatever lies in their place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from bagel_ds.data.formats import SOURCES
from bagel_ds.data.index import cache
from bagel_ds.data.index.index import DataFile, FileIndex, index_files
from bagel_ds.data.index.records import BadRows, differing
from tests.small_data import byte_tokenizer, t2i_rows, write_parquet


@pytest.fixture
def index(tmp_path: Path) -> FileIndex:
    rows = [*t2i_rows(4), {"image": b"", "captions": "{}"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    (index,) = index_files([DataFile(str(path), SOURCES["t2i"])], tokenizer, str(tmp_path / "cache"))
    assert index.is_kept
    return index


def _entry(index: FileIndex) -> Path:
    assert index.entry is not None
    return index.entry


def test_records_are_mapped_and_hold_no_file_open(index: FileIndex) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    kept = [cache.load(_entry(index), index.path) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert Path("/proc/self/maps").read_text(errors="replace").count(_entry(index).name) >= 20
    for one in kept:
        assert one is not None and differing(one.records, index.records) == []
        with pytest.raises(ValueError, match="read-only"):
            one.records.numbers[0] = 3


def test_an_entry_that_is_replaced_stays_readable_where_it_is_mapped(index: FileIndex) -> None:
    before = index.records.numbers.tolist()
    other = index.records._replace(numbers=index.records.numbers + 1)
    assert cache.save(_entry(index), index.layout, other, index.identity)
    assert index.records.numbers.tolist() == before


def test_reasons_of_any_number_of_bad_rows_are_kept_outside_the_header(index: FileIndex) -> None:
    """The header of a safetensors file may have 100 MB."""
    reasons = [(row, f"row {row} is bad: \u00e4 \ud800 " + "x" * 200) for row in range(2000)]
    records = index.records._replace(bad=BadRows.of(reasons))
    assert cache.save(_entry(index), index.layout, records, index.identity)
    with _entry(index).open("rb") as file:
        assert int.from_bytes(file.read(8), "little") < 2000
    kept = cache.load(_entry(index), index.path)
    assert kept is not None and len(kept.records.bad) == 2000
    row, reason = list(kept.records.bad)[1999]
    assert row == 1999 and reason.startswith("row 1999 is bad: \u00e4 \\ud800 xxx")
    assert [row for row, _ in kept.records.bad.between(7, 9)] == [7, 8]


def _as_arrays(entry: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(entry, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def _without(name: str) -> Any:
    def damage(entry: Path) -> None:
        arrays, about = _as_arrays(entry)
        del arrays[name]
        save_file(arrays, entry, about)

    return damage


def _cut_numbers(entry: Path) -> None:
    arrays, about = _as_arrays(entry)
    save_file({**arrays, "numbers": arrays["numbers"][:-1].copy()}, entry, about)


def _format_2(entry: Path) -> None:
    """As written before records were mapped."""
    arrays, about = _as_arrays(entry)
    header = {**json.loads(about["index"]), "bad": [[4, "the image has zero bytes"]]}
    old = {name: arrays[name] for name in ("numbers", "offsets", "unit_rows", "places")}
    save_file(old, entry, {"index": json.dumps(header)})


@pytest.mark.parametrize(
    "damage",
    [
        _format_2,
        _cut_numbers,
        _without("stamps"),
        _without("bad_text"),
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_bytes(b"\xff" * 100),
        lambda entry: entry.write_bytes((2).to_bytes(8, "little") + b"[]"),
        lambda entry: entry.write_bytes((2).to_bytes(8, "little") + b"{}"),
        lambda entry: entry.write_bytes(entry.read_bytes()[:-3]),
        lambda entry: entry.write_bytes(entry.read_bytes()[:40]),
        lambda entry: (entry.unlink(), entry.mkdir()),
        lambda entry: save_file({"x": np.zeros(1)}, entry),
    ],
)
def test_what_is_not_an_entry_is_not_there(index: FileIndex, damage: Any) -> None:
    damage(_entry(index))
    assert cache.load(_entry(index), index.path) is None


def test_an_entry_of_another_format_has_another_name(
    index: FileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = cache.cache_file(tmp_path, index.path, "key")
    monkeypatch.setattr(cache, "_FORMAT", 2)
    assert cache.cache_file(tmp_path, index.path, "key") != now
