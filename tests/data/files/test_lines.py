"""Lines of jsonl files: which count, and files that are something else."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from bagel_ds.data.files import lines as lines_module
from bagel_ds.data.files.filesystems import Unreadable
from bagel_ds.data.files.lines import jsonl_lines
from bagel_ds.data.formats import SOURCES
from bagel_ds.data.index.data_file import DataFile, layout_of
from bagel_ds.errors import UserError
from tests.small_data import byte_tokenizer, conversation, group, streams_of

ROWS = [conversation(f"question {row}", "answer") for row in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def _read(path: Path) -> list[str]:
    content = path.read_bytes()
    return [content[start : start + length].decode() for start, length in jsonl_lines(str(path))[0].tolist()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(ROWS), "a JSON array"),
        (json.dumps(ROWS[:1]), "a JSON array"),
        (json.dumps(ROWS, indent=1), "a JSON array"),
        (json.dumps(ROWS, indent=1)[:200], "a JSON array"),  # cut off
        ("\n\n" + json.dumps(ROWS), "a JSON array"),
        ("[" + ",\n".join(map(json.dumps, ROWS)) + "]", "a JSON array"),
        ("[\n" + "\n,".join(map(json.dumps, ROWS)) + "\n]\n", "a JSON array"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "run over several lines"),
        (gzip.compress(LINES.encode()), "compressed"),
        (b"\x28\xb5\x2f\xfd" + b"zstd", "compressed"),
        (LINES.encode("utf-16"), "UTF-16"),
        (LINES.encode("utf-16-le"), "UTF-16"),
        (LINES.encode("utf-16-be"), "UTF-16"),
        (LINES.encode("utf-32"), "UTF-32"),
        (b"PAR1", "parquet"),
    ],
)
def test_a_file_that_is_something_else_is_one_message(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(Unreadable, match=f"expected one JSON object per line: .*{reason}"):
        jsonl_lines(str(path))
    paths = {"data_dir": str(tmp_path), "jsonl_path": str(path)}
    with pytest.raises(UserError) as caught:
        streams_of(tmp_path, {"vlm_sft": group(paths)}, byte_tokenizer(tmp_path / "tokenizer"))
    assert str(caught.value).count(reason) == 1 and f"{path} as a whole" in str(caught.value)


@pytest.mark.parametrize(
    "first", ["[1]", "[", "{broken", "{", '["a"', "[" * 5000, "null", '"text"'], ids=lambda text: text[:8]
)
def test_a_bad_first_line_among_good_ones_is_a_bad_line(tmp_path: Path, first: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{first}\n{LINES}")
    assert len(_read(path)) == 1 + len(ROWS)


def test_a_byte_order_mark_and_any_line_end_belong_to_no_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode().rstrip())
    assert [json.loads(line) for line in _read(path)] == ROWS


def test_blank_lines_are_not_rows_and_keep_the_numbers_of_others(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + LINES.replace("\n", "\n \t\n", 1) + "\n\n")
    layout = layout_of(DataFile(str(path), SOURCES["vlm"]))
    assert layout.places[:, 2].tolist() == [2, 4, 5, 6]
    assert layout.rows == 4 and not layout.error
    # The original counts blank lines when it chooses lines.
    assert layout_of(DataFile(str(path), SOURCES["vlm"], lines=4)).places[:, 2].tolist() == [2, 4]


def test_an_array_of_one_long_line_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps([conversation("question", "a" * 1000)])
    for size, is_seen in ((len(line) - 1, True), (len(line) + 1, False)):
        monkeypatch.setattr(lines_module, "_ARRAY_BYTES", size)
        path.write_text(line + "\n" + LINES)  # which makes it a bad line where it is read as a whole
        if is_seen:
            with pytest.raises(Unreadable, match="JSON array"):
                jsonl_lines(str(path))
        else:
            assert len(_read(path)) == 5


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "loop"])
def test_what_is_not_a_regular_file_is_named_and_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.jsonl"
    reasons = {"pipe": "a named pipe", "folder": "a folder", "link": "a link to gone", "loop": "a link to data.jsonl"}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("gone" if kind == "link" else path.name)
    assert reasons[kind] in layout_of(DataFile(str(path), SOURCES["vlm"])).error
