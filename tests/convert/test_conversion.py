"""convert: every kind and form of input gives data that `check` passes and that reads back as the source; bad rows are
named and the others go on; a killed conversion continues to the same files; changed input is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from bagel_ds.cli.main import main
from bagel_ds.convert import conversion, outputs
from bagel_ds.convert.conversion import Options, convert
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.formats.registry import SOURCES
from bagel_ds.data.inspect.check import check_streams
from bagel_ds.data.inspect.check_report import as_json, unusable
from bagel_ds.data.streams.opening import index_streams
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import byte_tokenizer, picture

TEXTS = ["a cat", 'the "red" house, by day', "一只猫在桌子上", "line one\nline two"]
PICTURES = [picture(40 + 8 * i, 56, kind=("PNG", "JPEG", "WEBP")[i % 3], seed=i) for i in range(4)]
NAMES = ["a.png", "sub folder/a.jpg", "子/猫.webp", "b.png"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_pictures(folder: Path, names: list[str] = NAMES) -> None:
    for name, content in zip(names, PICTURES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the form that the ending of `path` says; "saved" is a folder of `save_to_disk`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        save_to_disk(path, rows)
    return path


def save_to_disk(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As `datasets` lays it out: Arrow streams, named by state.json."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = []
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        names.append(f"data-{number:05d}-of-00002.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def converted(kind: str, source: Path, out: Path, **options: Any) -> conversion.Result:
    return convert(Options(kind, str(source), str(out), **options))


def rows_of(config: Path) -> list[dict[str, Any]]:
    """The rows that the dataset config leads to, as its format reads them."""
    (group,) = load_dataset_config(str(config)).groups
    (dataset,) = group.datasets
    if group.kind == "vlm_sft":
        lines = [json.loads(line) for line in Path(dataset.files[0]).read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["pictures"] = [path.read_bytes() for path in SOURCES["vlm"].parse(line, dataset.images).images]
        return lines
    return [row for file in dataset.files for row in pq.read_table(file).to_pylist()]


def checks_well(config: Path, tokenizer: Tokenizer, rows: int) -> None:
    """`bagel-ds check` would use every row and find nothing to say."""
    options = SampleOptions(max_num_tokens_per_sample=100_000)
    streams = index_streams(load_dataset_config(str(config)), tokenizer, options, str(config.parent / "index"))
    results = check_streams(streams, tokenizer, 1)
    (found,) = (as_json(result) for result in results)
    assert not unusable(results)
    assert (found["rows"], found["usable"]) == (rows, rows), found
    assert not any(found[key] for key in found if key.endswith(("_images", "_texts", "_index"))), found


# ------------------------------------------------------------------------------------------------------ input forms
def test_a_folder_of_pictures_with_captions_beside_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "my 图 pictures"
    write_pictures(source)
    for name, text in zip(NAMES, TEXTS, strict=True):
        path = source / name
        # Both ways of naming a caption's file.
        (path.with_suffix(".txt") if len(name) > 5 else Path(f"{path}.txt")).write_text(f"\ufeff {text}\n", "utf-8")
    (source / ".hidden.png").write_bytes(b"")
    result = converted("captions", source, tmp_path / "out")
    found = {json.loads(row["captions"])["caption"]: row["image"] for row in rows_of(result.config)}
    assert found == dict(zip(TEXTS, PICTURES, strict=True))
    assert (result.usable, result.bad) == (4, 0)
    assert result.config == tmp_path / "out" / "my_图_pictures.yaml"
    checks_well(result.config, tokenizer, 4)


def test_captions_with_another_ending(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in")
    for name in NAMES:
        (tmp_path / "in" / name).with_suffix(".caption").write_text('{"not": "json"}')
    with pytest.raises(UserError, match=r"a.png would need a.txt.*--text_extension"):
        converted("captions", tmp_path / "in", tmp_path / "out")
    result = converted("captions", tmp_path / "in", tmp_path / "out", text_extension="caption")
    assert {json.loads(row["captions"])["caption"] for row in rows_of(result.config)} == {'{"not": "json"}'}


@pytest.mark.parametrize("image", ["image", "file_name", "PATH"])
@pytest.mark.parametrize("form", ["in.jsonl", "in.json", "in.csv", "in.tsv", "in.parquet", "saved"])
def test_captions_from_tables_that_name_pictures(form: str, image: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_pictures(tmp_path / "in")
    folder = "" if form != "saved" else "../"
    rows = [{"id": i, image: folder + NAMES[i], "caption": TEXTS[i]} for i in range(4)]
    result = converted("captions", write_table(tmp_path / "in" / form, rows), tmp_path / "out")
    found = rows_of(result.config)
    assert [row["image"] for row in found] == PICTURES
    assert [json.loads(row["captions"]) for row in found] == [{"caption": text} for text in TEXTS]
    checks_well(result.config, tokenizer, 4)


@pytest.mark.parametrize("form", ["in.parquet", "saved"])
def test_captions_from_columns_that_hold_pictures(form: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"image": {"bytes": PICTURES[i], "path": "same.png"}, "text": TEXTS[i]} for i in range(4)]
    result = converted("captions", write_table(tmp_path / form, rows), tmp_path / "out", name="set 1")
    assert [row["image"] for row in rows_of(result.config)] == PICTURES
    checks_well(result.config, tokenizer, 4)


def test_a_metadata_file_among_pictures_and_a_folder_of_parquet_files(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    rows = [{"file_name": name, "prompt": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    write_table(tmp_path / "pictures" / "metadata.jsonl", rows)
    assert converted("captions", tmp_path / "pictures", tmp_path / "out").usable == 4
    for split in ("train", "test"):
        some = [{"image": content, "caption": split} for content in PICTURES]
        write_table(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", some)
    with pytest.raises(UserError, match="--split with one of: test, train"):
        converted("captions", tmp_path / "hub", tmp_path / "out")
    result = converted("captions", tmp_path / "hub", tmp_path / "out", split="test")
    assert {row["captions"] for row in rows_of(result.config)} == {'{"caption": "test"}'}
    info = yaml.safe_load((tmp_path / "out" / "dataset_info.yaml").read_text())
    assert set(info["t2i_pretrain"]) == {"pictures", "hub"}, "the second data set keeps the first one's entry"


def test_the_splits_of_a_saved_dictionary(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "saved" / split, [{"image": content, "text": split} for content in PICTURES])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="more than one split; pass --split with one of: test, train"):
        converted("captions", tmp_path / "saved", tmp_path / "out")
    result = converted("captions", tmp_path / "saved", tmp_path / "out", split="train")
    assert {row["captions"] for row in rows_of(result.config)} == {'{"caption": "train"}'}


def test_several_captions_and_chosen_columns(tmp_path: Path) -> None:
    write_pictures(tmp_path / "elsewhere")
    rows = [
        {"pic": NAMES[0], "image": "x", "alt": ["one", "two"]},
        {"pic": NAMES[1], "image": "x", "alt": {"short": "three", "long": "four"}},
        {"pic": NAMES[2], "image": "x", "alt": '["five", "six"]'},
    ]
    source = write_table(tmp_path / "in.jsonl", rows)
    options = {"image_column": "pic", "text_column": "alt", "image_folder": str(tmp_path / "elsewhere")}
    result = converted("captions", source, tmp_path / "out", **options)
    texts = [list(json.loads(row["captions"]).values()) for row in rows_of(result.config)]
    assert texts == [["one", "two"], ["three", "four"], ["five", "six"]]
    with pytest.raises(UserError, match="--text_column altt: the input has no such column; did you mean 'alt'"):
        converted("captions", source, tmp_path / "new", text_column="altt")
    with pytest.raises(UserError, match="no column with captions was found; pass --text_column.*'pic', 'image', 'alt'"):
        converted("captions", source, tmp_path / "new")


@pytest.mark.parametrize("form", ["in.jsonl", "in.csv", "in.parquet", "saved"])
def test_edits(form: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_pictures(tmp_path)
    if form in ("in.jsonl", "in.csv"):
        pictures: list[Any] = list(NAMES)
        columns = ("source", "target", "instruction")
    else:
        pictures = [{"bytes": content, "path": None} for content in PICTURES]
        columns = ("input_image", "edited_image", "edit_prompt")
    rows = [dict(zip(columns, (pictures[i], pictures[3 - i], TEXTS[i]), strict=True)) for i in range(4)]
    result = converted("edit", write_table(tmp_path / form, rows), tmp_path / "out")
    found = rows_of(result.config)
    assert [row["image_list"] for row in found] == [[PICTURES[i], PICTURES[3 - i]] for i in range(4)]
    assert [row["instruction_list"] for row in found] == [[[text]] for text in TEXTS]
    checks_well(result.config, tokenizer, 4)


LLAVA = [
    {
        "id": 7,
        "image": NAMES[0],
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "一只猫"}],
    },
    {
        "images": NAMES[:2],
        "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first"}],
    },
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]},
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": NAMES[0]}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        ]
    },
    {
        "images": [NAMES[2]],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
            {"role": "assistant", "content": "A dog"},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64," + base64.b64encode(PICTURES[3]).decode()},
                    },
                    {"type": "text", "text": "Inline?"},
                ],
            },
            {"role": "assistant", "content": "Yes"},
        ],
    },
]


@pytest.mark.parametrize("form", ["in.json", "in.jsonl"])
def test_conversations_of_llava(form: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_pictures(tmp_path)
    result = converted("chat", write_table(tmp_path / form, LLAVA), tmp_path / "out")
    found = rows_of(result.config)
    assert [line["conversations"] for line in found] == [row["conversations"] for row in LLAVA]
    assert [line["pictures"] for line in found] == [PICTURES[:1], PICTURES[:2], []]
    assert found[0]["id"] == "7" and found[0]["image"].endswith(".png") and "image" not in found[2]
    stored = [path for path in (tmp_path / "out" / "in" / "images").rglob("*") if path.is_file()]
    assert len(stored) == 2, "a picture that two rows show is stored once"
    checks_well(result.config, tokenizer, 3)


def test_messages_with_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_pictures(tmp_path)
    result = converted("chat", write_table(tmp_path / "in.jsonl", MESSAGES), tmp_path / "out")
    found = rows_of(result.config)
    turns = [[(turn["from"], turn["value"]) for turn in line["conversations"]] for line in found]
    assert turns == [
        [("human", "Be brief."), ("human", "What?\n<image>"), ("gpt", "A cat")],
        [("human", "<image>\nAnd this?"), ("gpt", "A dog")],
        [("human", "<image>\nInline?"), ("gpt", "Yes")],
    ]
    assert [line["pictures"] for line in found] == [[PICTURES[0]], [PICTURES[2]], [PICTURES[3]]]
    checks_well(result.config, tokenizer, 3)


def test_messages_of_parquet_with_picture_columns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """`datasets` gives every part all keys, null where it has none."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A thing"}]
    rows = [
        {
            "images": [{"bytes": content, "path": None}],
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
        }
        for content in PICTURES
    ]
    result = converted("chat", write_table(tmp_path / "in.parquet", rows), tmp_path / "out")
    assert [line["pictures"] for line in rows_of(result.config)] == [[content] for content in PICTURES]
    checks_well(result.config, tokenizer, 4)


# --------------------------------------------------------------------------------------------------------- pictures
def turned(orientation: int, kind: str) -> tuple[bytes, np.ndarray]:
    """A picture with an EXIF orientation, and the pixels that a viewer shows."""
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[:24, :40], pixels[24:, :40], pixels[:24, 40:] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    upright = Image.fromarray(pixels)
    turns = (Image.Transpose.ROTATE_90, 6), (Image.Transpose.FLIP_LEFT_RIGHT, 2), (Image.Transpose.TRANSPOSE, 5)
    stored = next((upright.transpose(turn) for turn, number in turns if number == orientation), upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue(), pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 9])
def test_pictures_that_exif_turns_are_stored_upright(
    orientation: int, kind: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    content, pixels = turned(orientation, kind)
    rows = [{"image": content, "text": "x"}]
    result = converted("captions", write_table(tmp_path / "in.parquet", rows), tmp_path / "out")
    (row,) = rows_of(result.config)
    if orientation in (1, 9):
        assert row["image"] == content, "nothing turns it, so its bytes stay"
    with Image.open(io.BytesIO(row["image"])) as image:
        assert image.format == kind and image.size == (80, 48)
        off = np.abs(np.asarray(image.convert("RGB"), np.int16) - pixels.astype(np.int16))
    # Two JPEG encodings of flat colors; the edges between them ring.
    assert off.max() == 0 if kind == "PNG" else np.median(off) <= 3 and off.mean() < 6
    if orientation != 9:
        checks_well(result.config, tokenizer, 1)


# --------------------------------------------------------------------------------------------------------- bad rows
def test_bad_rows_are_named_with_place_and_reason_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    write_pictures(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "body.jpg").write_bytes(picture(64, 64, kind="JPEG")[:200])
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "deep.png").write_bytes(picture(8, 8, mode="I;16"))
    os.mkfifo(tmp_path / "pipe.png")
    good = json.dumps({"image": "a.png", "text": "fine"})
    lines: list[tuple[Any, str]] = [
        (good, ""),
        ('{"image": "a.png", "text"', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        (b'{"image": "a.png", "text": "\xff"}', "not UTF-8"),
        ({"image": "a.png"}, "text is missing"),
        ({"image": "a.png", "text": None}, "text is empty"),
        ({"image": "a.png", "text": " \n"}, "text holds no text"),
        ({"image": "a.png", "text": 5}, "text is 5, expected text"),
        ({"image": "a.png", "text": "\ud800"}, "half of a surrogate pair"),
        ({"image": "a.png", "text": "x" * 1_000_001}, "1,000,001 characters"),
        ({"text": "x"}, "image is missing"),
        ({"image": 3, "text": "x"}, "image is 3, expected the path"),
        ({"image": "gone.png", "text": "x"}, f"{tmp_path / 'gone.png'}: no such file"),
        ({"image": "sub folder\\a.jpg", "text": "x"}, "backslashes"),
        ({"image": "https://example.com/a.png", "text": "x"}, "is a URL; download"),
        ({"image": "data:image/png;base64,@@", "text": "x"}, "isn't valid base64"),
        ({"image": "text.png", "text": "x"}, "not a readable image"),
        ({"image": "empty.png", "text": "x"}, "not a readable image"),
        ({"image": "lfs.png", "text": "x"}, "Git LFS pointer"),
        ({"image": "deep.png", "text": "x"}, "more than 8 bits"),
        ({"image": "pipe.png", "text": "x"}, "a named pipe"),
        ({"image": ".", "text": "x"}, "a folder, not a file"),
        ({"image": "a\0b.png", "text": "x"}, "not a file name"),
        (good, ""),
    ]
    texts = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line, _ in lines]
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts)
    )
    assert main(["convert", "captions", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]) == 0
    report = [json.loads(line) for line in (tmp_path / "out" / "in" / "bad_rows.jsonl").read_text().splitlines()]
    expected = [(number, f"in.jsonl, line {number + 1}", why) for number, (_, why) in enumerate(lines) if why]
    assert [(row["row"], row["place"]) for row in report] == [(number, place) for number, place, _ in expected]
    for row, (_, _, why) in zip(report, expected, strict=True):
        assert why in row["reason"], row
    said = capsys.readouterr()
    assert "2 rows are converted" in said.out and f"{len(expected)} rows can't be used" in said.out
    assert "bad row: in.jsonl, line 2: the line is not valid JSON" in said.err and "more bad rows: see" in said.err
    checks_well(tmp_path / "out" / "in.yaml", tokenizer, 2)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversations": 5}, "conversations is 5, expected a list"),
        ({"conversations": []}, "nothing to learn"),
        ({"conversations": ["hello"]}, "turn 0 is 'hello', expected an object"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 0 has the role 'tool'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "nothing to learn"),
        ({"image": "a.png", "conversations": LLAVA[2]["conversations"]}, "has 1 pictures, its human turns show 0"),
        ({"conversations": LLAVA[0]["conversations"]}, "more pictures than the row has (0)"),
        ({"image": "gone.png", "conversations": LLAVA[0]["conversations"]}, "gone.png: no such file"),
        ({"video": "a.mp4", "conversations": LLAVA[2]["conversations"]}, "only pictures are converted"),
        ({"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}]}, "<video> 1 times"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "turn 0 holds no text"),
        ({"conversations": [{"role": "user", "content": [{"type": "audio"}]}]}, "part 0 of turn 0 is 'audio'"),
        ({"conversations": [{"role": "assistant", "content": [{"type": "image"}]}]}, "assistant shows a picture"),
    ],
)  # fmt: skip
def test_bad_conversations(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    result = converted("chat", write_table(tmp_path / "in.jsonl", [LLAVA[0], row]), tmp_path / "out")
    assert (result.usable, result.bad) == (1, 1)
    assert why in json.loads(result.bad_rows.read_text())["reason"]
    assert len(rows_of(result.config)) == 1


def test_bad_lines_of_a_csv_cost_only_themselves(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    content = b'image,text\na.png,one\n\na.png,too,many\na.png,\xff\na.png,"x"y\nb.png,two\nb.png,"open\nb.png,lost\n'
    (tmp_path / "in.csv").write_bytes(content)
    result = converted("captions", tmp_path / "in.csv", tmp_path / "out")
    report = [json.loads(line) for line in result.bad_rows.read_text().splitlines()]
    assert [(row["place"], row["reason"].partition(" (")[0]) for row in report] == [
        ("in.csv, line 4", "it has 3 fields, expected 2"),
        ("in.csv, line 5", "the line is not UTF-8"),
        ("in.csv, line 6", "not valid CSV"),
        ("in.csv, line 8", "not valid CSV"),
    ]
    assert [json.loads(row["captions"])["caption"] for row in rows_of(result.config)] == ["one", "two"]


def test_bad_pictures_of_a_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in")
    for name, text in zip(NAMES[:3], (b"fine", b"\xff", b" "), strict=True):
        (tmp_path / "in" / name).with_suffix(".txt").write_bytes(text)
    (tmp_path / "in" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "in" / "phone.txt").write_text("x")
    result = converted("captions", tmp_path / "in", tmp_path / "out")
    report = [json.loads(line) for line in result.bad_rows.read_text(encoding="utf-8").splitlines()]
    assert result.usable == 1
    # b.png and a.png differ in length: a.txt belongs to a.png, b.png has no text.
    assert [(row["place"], row["reason"].removeprefix(f"{tmp_path / 'in'}/")) for row in report] == [
        ("b.png", "no caption: b.txt does not exist"),
        ("phone.HEIC", "phone.HEIC: not a readable image (unknown format)"),
        ("sub folder/a.jpg", "a.txt is not UTF-8 (byte 1)"),
        ("子/猫.webp", "text holds no text"),
    ]


def test_a_damaged_row_group_costs_only_its_rows(tmp_path: Path) -> None:
    rows = [{"image": PICTURES[i % 4], "text": f"text {i}"} for i in range(9)]
    source = write_table(tmp_path / "in.parquet", rows)
    column = pq.read_metadata(source).row_group(1).column(0)
    with open(source, "r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    result = converted("captions", source, tmp_path / "out")
    report = [json.loads(line) for line in result.bad_rows.read_text().splitlines()]
    assert [row["place"] for row in report] == [f"in.parquet, row {i}" for i in (3, 4, 5)]
    assert all("row group 1 can't be read" in row["reason"] for row in report)
    texts = [json.loads(row["captions"])["caption"] for row in rows_of(result.config)]
    assert texts == [f"text {i}" for i in (0, 1, 2, 6, 7, 8)]


def test_nothing_usable_is_exit_code_2_and_the_next_try_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "in.jsonl", [{"image": NAMES[0], "text": "x"}])
    words = ["convert", "captions", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "none of the 1 rows of the input could be used: in.jsonl, line 1" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.yaml"))
    write_pictures(tmp_path)
    assert main(words) == 0
    assert (tmp_path / "out" / "in" / "bad_rows.jsonl").read_text() == ""


# ----------------------------------------------------------------------------------------------------------- resume
def many(folder: Path, kind: str) -> Path:
    """60 rows, every seventh of them bad."""
    write_pictures(folder)
    rows = []
    for i in range(60):
        name = "gone.png" if i % 7 == 3 else NAMES[i % 4]
        turns = [{"from": "human", "value": f"<image> {i}"}, {"from": "gpt", "value": f"answer {i}"}]
        chat = {"image": name, "conversations": turns}
        rows.append(
            {
                "captions": {"image": name, "text": f"text {i}"},
                "edit": {"source": name, "target": NAMES[0], "instruction": f"text {i}"},
                "chat": chat,
            }[kind]
        )
    return write_table(folder / "in.jsonl", rows)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# Runs a conversion slowly and with short shards of conversations, as a process that can be killed.
SLOW = """
import sys, time
from bagel_ds.convert import conversion, outputs
outputs.LINES_PER_SHARD = 7
add = outputs.BadRows.add
outputs.BadRows.add = lambda *given: (time.sleep(0.3), add(*given))
conversion.convert(conversion.Options(*sys.argv[1:4], rows_per_file=7, workers=3))
"""


@pytest.mark.parametrize("kind", ["captions", "edit", "chat"])
def test_a_killed_conversion_continues_to_the_same_files(
    kind: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "LINES_PER_SHARD", 7)
    source = many(tmp_path / "pictures", kind)
    whole = converted(kind, source, tmp_path / "whole", rows_per_file=7)
    process = subprocess.Popen([sys.executable, "-c", SLOW, kind, str(source), str(tmp_path / "killed")])
    state = tmp_path / "killed" / "in" / "conversion.json"
    deadline = time.monotonic() + 300
    while not (state.exists() and json.loads(state.read_text())["next_row"] >= 14):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = json.loads(state.read_text())
    assert 0 < stopped["next_row"] < 60 and not stopped["done"]
    result = converted(kind, source, tmp_path / "killed", rows_per_file=7)
    assert (result.usable, result.bad) == (whole.usable, whole.bad) == (51, 9)
    found = files_of(tmp_path / "killed")
    assert found == files_of(tmp_path / "whole")
    assert not any(name.endswith(".part") for name in found)
    checks_well(result.config, tokenizer, 51)


@pytest.mark.parametrize("kind", ["captions", "edit", "chat"])
def test_what_a_kill_leaves_after_the_last_complete_shard_is_done_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between a shard's rename and the note of it, with a half-written shard and reports beyond it."""
    monkeypatch.setattr(outputs, "LINES_PER_SHARD", 7)
    source = many(tmp_path / "pictures", kind)
    converted(kind, source, tmp_path / "whole", rows_per_file=7)
    saves = []

    def fail(progress: outputs.Progress, folder: Path) -> None:
        saves.append(progress.next_row)
        if len(saves) == 4:
            raise KeyboardInterrupt
        save(progress, folder)

    save = outputs.Progress.save
    with monkeypatch.context() as patched:
        patched.setattr(outputs.Progress, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            converted(kind, source, tmp_path / "cut", rows_per_file=7)
    if kind != "chat":
        (tmp_path / "cut" / "in" / ".00003.parquet.part").write_bytes(b"half")
    converted(kind, source, tmp_path / "cut", rows_per_file=7)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("form", ["in.jsonl", "in.json", "in.csv", "in.parquet", "saved"])
def test_every_form_of_input_continues_in_the_middle(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"image": str(tmp_path / NAMES[0]), "text": f"text {i}"} for i in range(9)]
    write_pictures(tmp_path)
    source = write_table(tmp_path / "in" / form, rows)

    def stop(*given: Any) -> Any:
        raise KeyboardInterrupt

    for shards in (1, 2, 3):  # 2 rows each
        name = f"after {shards}"
        with monkeypatch.context() as patched:
            finish = outputs.ParquetShards.finish

            def counted(output: outputs.ParquetShards, shards: int = shards, finish: Any = finish) -> dict[str, int]:
                return finish(output) if output.number < shards else stop()

            patched.setattr(outputs.ParquetShards, "finish", counted)
            with pytest.raises(KeyboardInterrupt):
                converted("captions", source, tmp_path / "out", rows_per_file=2, name=name)
        assert json.loads((tmp_path / "out" / name / "conversion.json").read_text())["next_row"] == 2 * shards
        found = rows_of(converted("captions", source, tmp_path / "out", rows_per_file=2, name=name).config)
        assert [json.loads(row["captions"])["caption"] for row in found] == [f"text {i}" for i in range(9)]


def test_a_complete_conversion_is_left_alone_and_changes_are_refused(tmp_path: Path) -> None:
    source = many(tmp_path / "pictures", "captions")
    out = tmp_path / "out"
    first = converted("captions", source, out)
    first.config.write_text(first.config.read_text() + "# edited\n")
    before = files_of(out)
    again = converted("captions", source, out, workers=3)
    assert again.was_done and again.usable == first.usable and files_of(out) == before
    with pytest.raises(UserError, match="other options.*rows_per_file was 10000, is 5.*Pass another --name"):
        converted("captions", source, out, rows_per_file=5)
    with open(source, "a") as file:
        file.write(json.dumps({"image": NAMES[0], "text": "one more"}) + "\n")
    with pytest.raises(UserError, match="but it has changed since.*Pass another --name"):
        converted("captions", source, out)
    assert files_of(out) == before


def test_a_changed_caption_and_a_removed_shard_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in")
    for name in NAMES:
        (tmp_path / "in" / name).with_suffix(".txt").write_text("x")
    converted("captions", tmp_path / "in", tmp_path / "out")
    shard = tmp_path / "out" / "in" / "00000.parquet"
    shard.rename(tmp_path / "away")
    with pytest.raises(UserError, match="00000.parquet has been removed or cut"):
        converted("captions", tmp_path / "in", tmp_path / "out")
    (tmp_path / "away").rename(shard)
    (tmp_path / "in" / "b.txt").write_text("another")
    with pytest.raises(UserError, match="but it has changed since"):
        converted("captions", tmp_path / "in", tmp_path / "out")


# ------------------------------------------------------------------------------------------------- the command line
def test_check_and_inspect_take_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three kinds in one folder, joined in one YAML, with the tiny BAGEL of the demo."""
    write_demo(tmp_path / "demo")
    groups: dict[str, Any] = {}
    for kind in ("captions", "edit", "chat"):
        result = converted(kind, many(tmp_path / kind, kind), tmp_path / "data", name=f"my {kind}")
        groups |= yaml.safe_load(result.config.read_text())
    config = tmp_path / "data" / "all.yaml"
    config.write_text(yaml.safe_dump(groups))
    words = ["--model_path", str(tmp_path / "demo" / "model"), "--dataset_config_file", str(config)]
    words += ["--max_num_tokens", "11520", "--max_num_tokens_per_sample", "10240", "--expected_num_tokens", "10240"]
    words += ["--interpolate_pos", "True"]  # the demo's position tables are small
    assert main(["check", *words, "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["datasets"]
    usable = {each["dataset"]: (each["rows"], each["usable"]) for each in found}
    assert usable == {f"my {kind}": (51, 51) for kind in ("captions", "edit", "chat")}
    assert main(["inspect", *words, "--steps", "20", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["samples_by_group"]) == set(groups)


def test_nothing_of_the_user_is_overwritten(tmp_path: Path) -> None:
    source = many(tmp_path / "pictures", "captions")
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "notes.md").write_text("x")
    with pytest.raises(UserError, match="holds other files; pass another --name"):
        converted("captions", source, out, name="mine")
    (out / "two.yaml").write_text("x: 1")
    with pytest.raises(UserError, match="two.yaml exists already"):
        converted("captions", source, out, name="two")
    (out / "dataset_info.yaml").write_text("t2i_pretrain: {}")
    with pytest.raises(UserError, match="is not from `bagel-ds convert`"):
        converted("captions", source, out, name="three")
    assert sorted(path.name for path in out.iterdir()) == ["dataset_info.yaml", "mine", "two.yaml"]
    with pytest.raises(UserError, match="lies in the input"):
        converted("captions", tmp_path / "pictures", tmp_path / "pictures" / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("captions nowhere", "nowhere can't be read: no such file"),
        ("captions in.txt", "in.txt: tables are .jsonl"),
        ("captions empty", "empty holds no pictures"),
        ("chat empty", "empty holds no parquet or Arrow files"),
        ("captions bad.parquet", "not a whole parquet file"),
        ("captions in.jsonl --split x", "--split x has no meaning"),
        ("captions in.jsonl --text_extension x", "--text_extension is for a folder"),
        ("captions in.jsonl --image_folder gone", "--image_folder gone: no such folder"),
        ("captions in.jsonl --name a/b", "--name 'a/b': expected"),
        ("captions empty.csv", "has no line of column names"),
        ("captions twice.csv", "names the column 'image' twice"),
        (
            "captions object.json",
            "no column with pictures was found; pass --image_column with one of the input's columns: 'a'",
        ),
        ("captions deep.json", "expected a list of rows"),
        ("edit in.jsonl", "no column with edited pictures was found; pass --target_column"),
    ],
)
def test_a_mistake_is_one_message(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_table(Path("in.jsonl"), [{"image": "a.png", "text": "x"}])
    for name, text in (
        ("in.txt", "x"),
        ("bad.parquet", "not parquet"),
        ("empty.csv", ""),
        ("twice.csv", "image,image\n"),
        ("object.json", '{"a": 1}'),
        ("deep.json", '{\n "a":\n 1}'),
    ):
        Path(name).write_text(text)
    assert main(["convert", *words.split(), "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not Path("out").exists()


def test_paths_from_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pictures(tmp_path)
    write_table(tmp_path / "in.jsonl", [{"image": "~/a.png", "text": "x"}])
    assert main(["convert", "captions", "~/in.jsonl", "--out", "~/新 data"]) == 0
    assert len(rows_of(tmp_path / "新 data" / "in.yaml")) == 1
    assert "check them: bagel-ds check" in capsys.readouterr().out


def test_a_folder_that_another_process_converts_into_is_refused(tmp_path: Path) -> None:
    source = many(tmp_path, "captions")
    with conversion._locked(tmp_path / "out" / "in"):
        with pytest.raises(UserError, match="another process is converting"):
            converted("captions", source, tmp_path / "out")
