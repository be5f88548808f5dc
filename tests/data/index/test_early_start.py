"""A run begins before all of its files are indexed, and nothing about its data is different for it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bagel_ds.data.batches.loader import PackingOptions, PlannedData
from bagel_ds.data.batches.materialize import LayoutOptions
from bagel_ds.data.formats import SOURCES
from bagel_ds.data.index.background import BackgroundIndex, index_in_background
from bagel_ds.data.index.index import DataFile, DataIndex
from bagel_ds.data.plan import row_order
from bagel_ds.data.streams import opening
from bagel_ds.data.streams.opening import files_ahead, open_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import (
    NO_DROPOUT,
    byte_tokenizer,
    config_of,
    conversation,
    group,
    picture,
    t2i_rows,
    write_parquet,
)

FILES, ROWS = 60, 20  # of each of two data sets
PACKING = PackingOptions(max_num_tokens=400, expected_num_tokens=300, lookahead=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("one", "two"):
        for number in range(FILES):
            rows = t2i_rows(ROWS)
            rows[number % ROWS]["captions"] = "{broken"  # one bad row in every file
            write_parquet(folder / name / f"{number:02}.parquet", rows, group_rows=10)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return byte_tokenizer(folder / "tokenizer")


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are many, so that few files are needed at first."""
    monkeypatch.setattr(opening, "AT_ONCE_ROWS", 100)
    monkeypatch.setattr(opening, "FIRST_ROWS", 40)
    monkeypatch.setattr(row_order, "WINDOW_ROWS", 40)


def groups(folder: Path) -> dict[str, Any]:
    paths = {name: {"data_dir": str(folder / name), "num_files": FILES} for name in ("one", "two")}
    return {
        "t2i_pretrain": group(paths["one"], "one", weight=1.0, is_mandatory=True),
        "t2i_more": group(paths["two"], "two", weight=0.5, kind="t2i_pretrain"),
    }


def opened(folder: Path, tokenizer: Tokenizer, cache: Path, **cursors: Any) -> PlannedData:
    config = config_of(folder / "configs" / cache.name, groups(folder))
    streams = open_streams(config, tokenizer, SampleOptions(**NO_DROPOUT), str(cache), **cursors)
    return PlannedData(streams, tokenizer, LayoutOptions(), PACKING, noise_seed=0)


def opened_beside_indexing(folder: Path, tokenizer: Tokenizer, cache: Path) -> tuple[PlannedData, BackgroundIndex]:
    """Data of which most is being indexed in another process."""
    data = opened(folder, tokenizer, cache)
    return data, index_in_background(data.files_ahead(), tokenizer, str(cache))


def steps(data: PlannedData, count: int, start: dict[str, Any] | None = None) -> list[Any]:
    return [(step.packs, step.state) for step in itertools.islice(data.planner.steps(2, start), count)]


def indexed(data: PlannedData) -> int:
    return sum(use.index.is_indexed for stream in data.streams for use in stream.uses)


@pytest.fixture
def whole(folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedData:
    """The same data, indexed as a whole beforehand."""
    monkeypatch.setattr(row_order, "WINDOW_ROWS", 40)
    data = opened(folder, tokenizer, tmp_path / "whole")
    assert indexed(data) == 2 * FILES
    return data


def test_a_run_begins_with_the_files_of_its_first_rows_and_the_packs_are_the_same(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, whole: PlannedData, early: None
) -> None:
    data = opened(folder, tokenizer, tmp_path / "early")
    assert 0 < indexed(data) < FILES / 2
    assert data.fingerprint == whole.fingerprint
    expected = steps(whole, 400)
    found = steps(data, 400)
    assert found == expected
    assert indexed(data) == 2 * FILES, "400 steps are more than an epoch"
    assert sorted(data.streams[0].bad_rows) == sorted(whole.streams[0].bad_rows)
    assert data.unusable_rows() == whole.unusable_rows() == {"one": FILES, "two": FILES}


def test_the_second_process_of_a_host_indexes_nothing_more(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, early: None
) -> None:
    first, second = (opened(folder, tokenizer, tmp_path / "early") for _ in range(2))
    assert 0 < indexed(first) == indexed(second) < FILES / 2
    assert first.fingerprint == second.fingerprint


def test_files_ahead_are_in_the_order_in_which_planning_asks_for_them(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, early: None
) -> None:
    data = opened(folder, tokenizer, tmp_path / "early")
    stream = data.streams[0]
    ahead = [file for file in data.files_ahead() if Path(file.path).parent.name == "one"]
    met: list[Any] = []
    order = row_order.RowOrder(stream.units, PACKING.data_seed, stream.name)
    for _ in range(stream.rows):
        index = stream.index_of(order.next()[1])
        if not index.is_indexed and index.file not in met:
            met.append(index.file)
    assert set(ahead) == set(met) and len(ahead) > FILES / 2
    # Rows of one window come in any order, so that files may change places with those of the same window alone.
    assert all(abs(ahead.index(file) - place) <= 4 for place, file in enumerate(met))


def test_a_resumed_run_begins_with_the_files_of_its_next_rows(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, whole: PlannedData, early: None
) -> None:
    place = next(state for _, state in steps(whole, 400) if state["block"]["groups"]["t2i_pretrain"][1] > 100)
    groups = place["block"]["groups"]
    data = opened(folder, tokenizer, tmp_path / "resumed", cursors=groups)
    assert indexed(data) < FILES
    assert data.planner.plans_again(place)
    assert steps(data, 100, place) == steps(whole, 100, place)


def test_a_run_plans_alongside_the_process_that_indexes_what_it_will_need(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, whole: PlannedData, early: None
) -> None:
    cache = tmp_path / "shared"
    data, background = opened_beside_indexing(folder, tokenizer, cache)
    try:
        assert steps(data, 400) == steps(whole, 400)
    finally:
        background.close()
    assert background.process is not None and not psutil.pid_exists(background.process.pid)


def test_the_background_process_indexes_everything_and_ends(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, early: None
) -> None:
    cache = tmp_path / "shared"
    data, background = opened_beside_indexing(folder, tokenizer, cache)
    assert background.process is not None
    assert background.process.connection.poll(120)
    assert background.process.ended(patience=60) == 0
    files = [use.index.file for stream in data.streams for use in stream.uses]
    assert not DataIndex(files, tokenizer, str(cache)).missing()
    background.close()


def test_a_run_does_itself_what_a_killed_background_process_left(
    folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    whole: PlannedData,
    early: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "shared"
    data, background = opened_beside_indexing(folder, tokenizer, cache)
    assert background.process is not None
    before = len(list(cache.glob("*.safetensors")))
    until = time.monotonic() + 120
    while len(list(cache.glob("*.safetensors"))) == before and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(background.process.pid, signal.SIGKILL)
    assert steps(data, 400) == steps(whole, 400)
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        background.close()
    assert "the process that indexed ahead ended with code -9; training did the rest itself" in caplog.text


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> list[DataFile]:
    """Files with more rows than one process indexes alone."""
    folder = tmp_path_factory.mktemp("many")
    captions = [json.dumps({"caption": f"number {row}"}) for row in range(1000)]
    table = pa.table({"image": [picture(16, 16)] * len(captions), "captions": captions})
    files = [DataFile(str(folder / f"{number:02}.parquet"), SOURCES["t2i"]) for number in range(30)]
    for file in files:
        pq.write_table(table, file.path)
    return files


@pytest.mark.parametrize("started", [0, 1, 2])
def test_the_background_process_takes_those_it_has_started_with_it(
    many_rows: list[DataFile], tokenizer: Tokenizer, tmp_path: Path, started: int
) -> None:
    """However soon it is killed: one that is left would hold the launch's output open for ever."""
    background = index_in_background(many_rows, tokenizer, str(tmp_path))
    assert background.process is not None
    tree: list[psutil.Process] = []
    until = time.monotonic() + 120
    while len(tree) < started and time.monotonic() < until:
        tree = psutil.Process(background.process.pid).children(recursive=True)  # a server, then workers
    background.close()
    assert len(tree) >= started or len(os.sched_getaffinity(0)) < 2
    assert not psutil.wait_procs(tree, timeout=30)[1]


def test_nothing_is_started_where_nothing_is_left(whole: PlannedData, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert whole.files_ahead() == []
    background = index_in_background([], tokenizer, str(tmp_path))
    assert background.process is None
    background.close()


def test_without_a_cache_folder_files_are_indexed_in_memory_as_they_are_needed(
    folder: Path, tokenizer: Tokenizer, whole: PlannedData, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagel_ds.data.index.cache.cache_folder", lambda path, cache_dir: None)
    data = opened(folder, tokenizer, folder / "nowhere")
    assert indexed(data) < FILES
    assert steps(data, 400) == steps(whole, 400)


def test_a_file_that_changes_before_it_is_indexed_ends_the_run_with_its_name(
    tmp_path: Path, tokenizer: Tokenizer, early: None
) -> None:
    for number in range(FILES):
        write_parquet(tmp_path / "one" / f"{number:02}.parquet", t2i_rows(ROWS), group_rows=10)
    paths = {"data_dir": str(tmp_path / "one"), "num_files": FILES}
    config = config_of(tmp_path, {"t2i_pretrain": group(paths, "one")})
    streams = open_streams(config, tokenizer, SampleOptions(**NO_DROPOUT), str(tmp_path / "cache"))
    late = files_ahead(streams, seed=42)[-1]
    write_parquet(Path(late.path), t2i_rows(ROWS + 1), group_rows=10)
    data = PlannedData(streams, tokenizer, LayoutOptions(), PACKING, noise_seed=0)
    with pytest.raises(UserError, match=f"{late.path} changed while it was in use"):
        steps(data, 400)


def test_every_dataset_shows_a_usable_row_before_a_run_begins(
    tmp_path: Path, tokenizer: Tokenizer, early: None
) -> None:
    for number in range(FILES):
        write_parquet(tmp_path / "good" / f"{number:02}.parquet", t2i_rows(ROWS), group_rows=10)
    broken = [{**row, "captions": "{"} for row in t2i_rows(3)]
    write_parquet(tmp_path / "bad" / "a.parquet", broken)
    names = [
        {"name": "good", "data_dir": str(tmp_path / "good"), "num_files": FILES},
        {"name": "bad", "data_dir": str(tmp_path / "bad"), "num_files": 1},
    ]
    config = config_of(tmp_path, {"t2i_pretrain": {**group({}, "x"), "dataset_names": names}})
    with pytest.raises(UserError, match="t2i_pretrain/bad: none of its 3 rows can be used"):
        open_streams(config, tokenizer, SampleOptions(**NO_DROPOUT), str(tmp_path / "cache"))


def test_pictures_that_change_between_runs_are_noticed_and_the_run_goes_on_at_its_place(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows are the same, their samples are not: another plan, from the same place in the data."""
    images = tmp_path / "images"
    images.mkdir()
    for row in range(200):
        (images / f"{row}.png").write_bytes(picture(28 + row % 5 * 14, 28))
    lines = [conversation(f"<image> what? {row}", "a thing", image=f"{row}.png") for row in range(200)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"data_dir": str(images), "jsonl_path": str(tmp_path / "data.jsonl")}

    def opened_now(cache: str) -> PlannedData:
        config = config_of(tmp_path, {"vlm_sft": group(paths, "vlm")})
        streams: list[GroupStream] = open_streams(config, tokenizer, SampleOptions(**NO_DROPOUT), str(tmp_path / cache))
        return PlannedData(streams, tokenizer, LayoutOptions(), PACKING, noise_seed=0)

    before = opened_now("before")
    batches = before.micro_batches(0, 1)
    place = [next(batches).state for _ in range(10)][-1]
    batches.close()
    (images / "199.png").write_bytes(picture(140, 140))
    after = opened_now("after")
    caplog.clear()
    again = after.micro_batches(0, 1, start=place)
    assert next(again).state["packs"] == place["packs"] + 1
    again.close()
    assert "The data plan changed since the checkpoint" in caplog.text
