"""check: every row read, every picture decoded, each finding once and with its place; the report's two forms agree."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bagel_ds.data.formats.record import UNUSED_IMAGE, UNUSED_TEXT, ParsedRow
from bagel_ds.data.inspect import check
from bagel_ds.data.inspect.check import (
    DAMAGED,
    DRAWN,
    GIVEN,
    NOTES,
    OUTDATED,
    SEEN,
    SPECIAL,
    TEXTS,
    TURNED,
    DatasetCheck,
    check_streams,
)
from bagel_ds.data.inspect.check_report import as_json, as_text, unusable
from bagel_ds.data.samples.sample import TEXT, VIT, Entry
from bagel_ds.data.samples.video import Video
from bagel_ds.data.streams.opening import index_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import (
    byte_tokenizer,
    config_of,
    conversation,
    group,
    mixed_groups,
    picture,
    streams_of,
    t2i_rows,
    write_conversations,
    write_parquet,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def broken_body() -> bytes:
    """A JPEG whose header is fine and that ends before its first pixel."""
    whole = picture(64, 64, kind="JPEG")
    return whole[: whole.index(b"\xff\xc0") + 20] + b"\xff\xd9" * 100


def damaged_groups(folder: Path) -> dict[str, Any]:
    """t2i with one row of every fate, in row groups of two; conversations with a missing picture."""
    rows = t2i_rows(6)
    rows[1]["image"] = b""
    rows[2]["image"] = broken_body()
    rows[3]["image"] = rows[3]["image"][:-200]
    rows[4]["captions"] = json.dumps({"a": "a text with <|im_end|> in it"})
    rows[5]["captions"] = json.dumps({"a": "x" * 300})
    write_parquet(folder / "t2i" / "a.parquet", rows)
    lines = [
        conversation("<image>", "a thing", image="x.png"),
        conversation("<image>", "nothing", image="gone.png"),
        "not json",
    ]
    talks = write_conversations(folder / "vlm", lines, {"x.png": picture(40, 40)})
    return {"t2i_pretrain": group({"data_dir": str(folder / "t2i")}, "pictures"), "vlm_sft": group(talks, "talks")}


def checked(folder: Path, tokenizer: Tokenizer, workers: int = 1) -> list[DatasetCheck]:
    options = SampleOptions(max_num_tokens_per_sample=150)
    streams = index_streams(config_of(folder, damaged_groups(folder)), tokenizer, options, str(folder / "index"))
    return check_streams(streams, tokenizer, workers)


def test_each_row_that_cannot_be_used_is_listed_once_with_place_and_reason(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    pictures, talks = checked(tmp_path, tokenizer)
    assert (pictures.rows, pictures.usable, pictures.too_long) == (6, 3, 1)
    found = [row.place[2:] for row in pictures.unusable]
    assert found == [(0, 1), (1, 0), (2, 1)]
    reasons = [row.reason for row in pictures.unusable]
    assert "zero bytes" in reasons[0] and "cannot be decoded" in reasons[1]
    assert reasons[2] == "the sample is longer than max_num_tokens_per_sample 150"
    assert all(row.place.file == str(tmp_path / "t2i" / "a.parquet") for row in pictures.unusable)
    assert (talks.rows, talks.usable) == (3, 1)
    assert [row.place[2:] for row in talks.unusable] == [(-1, 2), (-1, 3)]
    assert "no such file" in talks.unusable[0].reason


def test_odd_but_usable_rows_are_told_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pictures, talks = checked(tmp_path, tokenizer)
    assert [row.place[2:] for row in pictures.notes[DAMAGED]] == [(1, 1)]
    assert "used as far as it goes" in pictures.notes[DAMAGED][0].reason
    assert [row.place[2:] for row in pictures.notes[SPECIAL]] == [(2, 0)]
    assert pictures.notes[SPECIAL][0].reason == "a text holds <|im_end|>, which becomes special tokens"
    assert not any(talks.notes.values())


def test_counts_are_those_of_the_plan(tmp_path: Path, tokenizer: Tokenizer) -> None:
    streams = streams_of(tmp_path, mixed_groups(tmp_path), tokenizer)
    results = check_streams(streams, tokenizer, 1)
    assert [result.dataset for result in results] == ["pictures", "edits", "talks", "puzzles"]
    for stream, result in zip(streams, results, strict=True):
        plans = [plan for row in range(stream.rows) if (plan := stream.plan_sample(row, 0))]
        entries = [entry for plan in plans for entry in plan.entries]
        assert result.usable == result.rows == len(plans) and not result.unusable
        assert result.lengths.tolist() == [plan.length for plan in plans]
        assert result.tokens == {
            TEXTS: sum(e.tokens for e in entries if e.kind == TEXT),
            SEEN: sum(e.tokens for e in entries if e.kind == VIT),
            GIVEN: sum(e.tokens for e in entries if e.kind not in (TEXT, VIT) and not e.loss),
            DRAWN: sum(e.tokens for e in entries if e.kind not in (TEXT, VIT) and e.loss),
        }


def test_a_repeated_file_counts_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(3))
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}, num_used_data=[4])}
    (result,) = check_streams(streams_of(tmp_path, groups, tokenizer), tokenizer, 1)
    assert (result.files, result.rows, result.usable) == (1, 3, 3)


def test_processes_find_what_one_finds(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = checked(tmp_path, tokenizer)
    monkeypatch.setattr(check, "_POOL_ROWS", 0)
    assert checked(tmp_path, tokenizer, workers=2) == alone


def test_check_believes_what_it_reads_and_repairs_the_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also where no folder's time says so: a picture is overwritten in its place."""
    lines = [conversation("<image>", "a", image=f"{name}.png") for name in "abc"]
    paths = write_conversations(tmp_path / "vlm", lines, dict.fromkeys(("a.png", "b.png"), picture(40, 40)))
    folder = Path(paths["data_dir"])

    def opened() -> list[Any]:
        config = config_of(tmp_path, {"vlm_sft": group(paths, "talks")})
        return index_streams(config, tokenizer, SampleOptions(), str(tmp_path / "index"))

    streams = opened()
    (result,) = check_streams(streams, tokenizer, 1)
    assert [row.place.row for row in result.unusable] == [3] and not result.notes[OUTDATED]
    time = folder.stat()
    (folder / "b.png").write_bytes(picture(80, 40))
    (folder / "c.png").write_bytes(picture(20, 20))
    os.utime(folder, ns=(time.st_atime_ns, time.st_mtime_ns))
    streams = opened()
    (result,) = check_streams(streams, tokenizer, 1)
    assert result.usable == 3 and not result.unusable
    assert [row.place.row for row in result.notes[OUTDATED]] == [2, 3]
    assert list(zip(result.widths, result.heights, strict=True)) == [(40, 40), (80, 40), (20, 20)]
    (stream,) = opened()  # a run that comes later
    assert [entry.width for row in range(3) for entry in _images(stream, row)] == [
        entry.width for row in range(3) for entry in _images(streams[0], row)
    ]
    (again,) = check_streams([stream], tokenizer, 1)
    assert again.usable == 3 and not again.notes[OUTDATED]


def _images(stream: GroupStream, row: int) -> list[Entry]:
    plan = stream.plan_sample(row, 0)
    assert plan is not None
    return [entry for entry in plan.entries if entry.kind == VIT]


def test_rows_that_lose_something_are_counted_and_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.new("RGB", (40, 30)).save(turned, "JPEG", exif=exif.tobytes())
    lines = [
        conversation("<image>", "fine", image="a.png"),
        conversation("<Image>", "unseen", image="a.png"),
        conversation("<image>", "turned", image="turned.jpg"),
    ]
    lines.append(conversation("<image>", "a", image="a.png"))
    lines[3]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    paths = write_conversations(tmp_path / "vlm", lines, {"a.png": picture(40, 40), "turned.jpg": turned.getvalue()})
    (result,) = check_streams(streams_of(tmp_path, {"vlm_sft": group(paths)}, tokenizer), tokenizer, 1)
    assert result.usable == 4
    found = {kind: [row.place.row for row in rows] for kind, rows in result.notes.items() if rows}
    assert found == {UNUSED_IMAGE: [2], TURNED: [3], UNUSED_TEXT: [4]}
    text = "\n".join(as_text([result]))
    assert "pictures turned by EXIF (used as they are stored): 1" in text
    assert "pictures that no turn or item shows (left out): 1" in text and "turns and instructions that are" in text


def test_both_reports_say_everything(tmp_path: Path, tokenizer: Tokenizer) -> None:
    results = checked(tmp_path, tokenizer)
    text = "\n".join(as_text(results))
    for result in results:
        data = json.loads(json.dumps(as_json(result)))
        assert len(data["bad_rows"]) == result.rows - result.usable
        for row in data["bad_rows"] + [row for kind in NOTES for row in data[kind]]:
            group = row["row_group"]
            place = f"line {row['row']}" if group is None else f"row group {group} row {row['row']}"
            assert f"{row['dataset']}: {row['file']} {place}: {row['reason']}" in text
        assert data["sample_length"]["p50"] == np.median(result.lengths)
        assert data["images"]["count"] == len(result.widths)
    assert "rows that cannot be used: 5" in text


def test_a_dataset_without_a_usable_row_is_reported_not_raised(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{**row, "image": broken_body()} for row in t2i_rows(2)]
    write_parquet(tmp_path / "t2i" / "a.parquet", rows)
    (tmp_path / "t2i" / "b.parquet").write_bytes(b"no parquet")
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}, "pictures")}
    streams = index_streams(config_of(tmp_path, groups), tokenizer, SampleOptions(), str(tmp_path / "index"))
    results = check_streams(streams, tokenizer, 1)
    assert unusable(results) == ["dataset t2i_pretrain/pictures: none of its 2 rows can be used"]
    assert as_json(results[0])["sample_length"] is None
    assert as_json(results[0])["bad_rows"][-1]["row"] is None, "a whole file has no row"
    assert "b.parquet as a whole" in "\n".join(as_text(results))


def test_frames_of_a_video_are_decoded_up_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(check, "decode_frames", lambda video, numbers: asked.extend(numbers))
    assert (
        list(check._decode(ParsedRow((), [], [Video(Path("x.mp4"), 1000, 64, 48), Video(Path("y.mp4"), 2, 64, 48)])))
        == []
    )
    first, second = asked[:-2], asked[-2:]
    assert second == [0, 1] and first[0] == 0 and first[-1] == 999 and max(np.diff(first)) < 100
