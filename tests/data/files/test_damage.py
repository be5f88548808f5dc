"""A thousand damaged inputs: each is counted and named once, none stops anything, none opens a file outside the data.

Damage is drawn from fixed seeds. A case is a row: damaged pictures in parquet rows, damaged lines of a jsonl, damaged
bytes of whole parquet files. What damage leaves usable is used; intact rows in between must come out as if alone.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bagel_ds.data.batches.loader import PackingOptions, PlannedData
from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.files import rows as raw_rows
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import SamplePlan
from bagel_ds.data.streams.stream import GroupStream
from tests.small_data import byte_tokenizer, conversation, group, picture, streams_of, t2i_rows, write_conversations

PICTURES, LINES, FILES = 500, 400, 120  # damaged pictures, lines and files: more than a thousand
INTACT = 5  # every so many rows, one without damage

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_note)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Real paths of the files that python opens meanwhile."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises so many pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(100))) + _chunk(b"IEND", b"")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """Whole pictures of every sort, and files that are none."""
    rgb = Image.open(io.BytesIO(picture(40, 48)))
    deep = Image.fromarray(np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 30)
    frames = [Image.open(io.BytesIO(picture(24, 24, seed=i))) for i in range(3)]
    return {
        "jpeg": _encoded(rgb, "JPEG"),
        "progressive": _encoded(rgb, "JPEG", progressive=True),
        "cmyk": _encoded(rgb.convert("CMYK"), "JPEG"),
        "grey": _encoded(rgb.convert("L"), "JPEG"),
        "png": _encoded(rgb, "PNG"),
        "palette": _encoded(rgb.convert("P"), "PNG", transparency=0),
        "alpha": _encoded(rgb.convert("RGBA"), "PNG"),
        "one bit": _encoded(rgb.convert("1"), "PNG"),
        "16 bit": _encoded(deep, "PNG"),
        "float": _encoded(rgb.convert("F"), "TIFF"),
        "tiff": _encoded(rgb, "TIFF", compression="tiff_lzw"),
        "webp": _encoded(rgb, "WEBP"),
        "bmp": _encoded(rgb, "BMP"),
        "animated": _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "1x1": picture(1, 1),
        "long": picture(20000, 10),
        "bomb": bomb(100_000, 100_000),
        "small bomb": bomb(5_000, 5_000),
        "no pixels": bomb(0, 0),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "html": b"<html>404 not found</html>",
        "zeros": bytes(1000),
        "empty": b"",
    }


UNUSABLE = ("16 bit", "float", "bomb", "no pixels", "postscript", "svg", "html", "zeros", "empty")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, bytes changed, a piece lost or doubled, or zeros in it."""
    if not content:
        return content
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.randrange(1, 64))
    way = rng.randrange(5)
    if way == 0:
        return content[:start]
    if way == 1:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    middle = {2: b"", 3: content[start:stop] * 2, 4: bytes(stop - start)}[way]
    return content[:start] + middle + content[stop:]


def _account(streams: list[GroupStream], tokenizer: Any, per_pack: int = 8) -> dict[int, str]:
    """Make every row that can be planned; what failed, by row. Each row is used, bad, or skipped: exactly one."""
    (stream,) = streams
    plans = {row: plan for row in range(stream.rows) if (plan := stream.plan_sample(row, 0))}
    named = Counter(bad.place for bad in stream.bad_rows if bad.place.row >= 0)
    assert all(times == 1 for times in named.values())
    assert all(bad.reason and "\n" not in bad.reason for bad in stream.bad_rows)
    assert len(plans) + len(named) + len(stream.too_long) == stream.rows
    skipped: dict[int, str] = {}
    rows = list(plans)
    for first in range(0, len(rows), per_pack):
        pack = [plans[row] for row in rows[first : first + per_pack]]
        batch = materialize(pack, streams, tokenizer, LayoutOptions(), 0)
        by_name = {str(stream.place(plan.row)): plan.row for plan in pack}
        reasons = {": ".join(reason.split(": ", 2)[:2]): reason for _, reason in batch.skipped}
        assert len(batch.samples) + len(reasons) == len(pack) == len(by_name)
        assert set(batch.samples) | set(reasons) == set(by_name)
        assert batch.sample_lens == tuple(plan.length for plan in pack if str(stream.place(plan.row)) in batch.samples)
        skipped |= {by_name[name]: reason for name, reason in reasons.items()}
        kept = [plan for plan in pack if plan.row not in skipped]
        if reasons and kept:
            _assert_equal(batch, materialize(kept, streams, tokenizer, LayoutOptions(), 0))
    return skipped


def _assert_equal(batch: Any, other: Any) -> None:
    """Broken samples leave the others as they are."""
    for name in ("text_ids", "position_ids", "vit_patches", "noise", "posterior_eps", "timesteps"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert len(batch.images) == len(other.images)
    assert all(torch.equal(*pair) for pair in zip(batch.images, other.images, strict=True))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture beside the data that nothing may open."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(picture(40, 40))
    return tmp_path / "outside"


def _write_pictures(path: Path, count: int) -> list[str]:
    """What each of `count` rows is: intact, an odd sort of picture, or a damaged one."""
    rng, sorts = random.Random(0), list(odd_pictures().items())
    names, rows = [], []
    for i in range(count):
        name, content = ("intact", picture(40, 48, seed=i)) if i % INTACT == 0 else sorts[i % len(sorts)]
        if i >= 2 * len(sorts) and name != "intact":
            name, content = f"damaged {name}", damaged(content, rng)
        names.append(name)
        rows.append({"image": content, "captions": json.dumps({"a": f"row {i}"})})
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    return names


def test_damaged_pictures_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "a.parquet"
    names = _write_pictures(path, PICTURES + PICTURES // INTACT)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streams = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(path.parent)})}, tokenizer)
        skipped = _account(streams, tokenizer)
    bad = {50 * row.place.row_group + row.place.row for row in streams[0].bad_rows}
    for row, name in enumerate(names):
        assert name != "intact" or (row not in bad and row not in skipped)
        assert name not in UNUSABLE or row in bad, name
        assert name in (*UNUSABLE, "small bomb", "intact") or name.startswith("damaged") or row not in bad, name
    assert skipped, "some bodies must break although their headers are fine"


def test_workers_go_on_past_damaged_pictures(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "a.parquet"
    _write_pictures(path, 200)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    streams = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(path.parent)})}, tokenizer)
    expected = {str(streams[0].place(row)) for row in range(200) if streams[0].plan_sample(row, 0)}
    data = PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(400, 300), 0)
    batches = data.micro_batches(0, 1, num_workers=2)
    made: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for _, micro_batch in zip(range(400), batches):
        made.update(micro_batch.batch.samples)
        skipped.update(": ".join(reason.split(": ", 2)[:2]) for _, reason in micro_batch.batch.skipped)
        if len(made) + len(skipped) == len(expected):
            break
    batches.close()
    assert made.keys() | skipped.keys() == expected and not made.keys() & skipped.keys()
    assert skipped


def _lines(rng: random.Random) -> list[Any]:
    """Lines with each fault that has a name, then lines with random damage."""
    texts: list[Any] = [None, float("nan"), 3, [], {}, "", True, ["a"], "\ud800", "a" * 100_000]
    paths: list[Any] = ["../outside/secret.png", "/etc/hostname", "link.png", "links/secret.png", "ring", "pipe.png"]
    paths += ["", ".", "sub", "x.png/", "x.png\0", "a" * 5000, "absent.png", "C:\\x.png", "~/x.png", None, 7, {}, []]
    paths += [["x.png", None], [["x.png"]], "sub/../x.png", "file:///etc/hostname", "http://localhost/x.png", "|x.png"]
    lines: list[Any] = [
        {"image": "x.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]}
        for text in texts
    ]
    lines += [{"image": path, **conversation("<image> what?", "a thing")} for path in paths]
    lines += [{"image": "x.png", "conversations": turns} for turns in (None, 3, "text", {}, [], [None], [3], ["a"])]
    lines += ["", " ", "null", "3", '"text"', "[]", "{", "{}", "NaN", "\ufeff{}", '{"a": 1} {"b": 2}', "[" * 5000]
    whole = json.dumps({"image": "x.png", **conversation("<image> what?", "a thing", "why?", "so")})
    while len(lines) < LINES:
        broken = damaged(whole.encode(), rng).replace(b"\n", b" ").replace(b"\r", b" ")
        lines.append(broken.decode("latin-1"))
    return lines


def test_damaged_lines_of_conversations(tmp_path: Path, outside: Path) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "link.png").symlink_to(outside / "secret.png")
    (images / "links").symlink_to(outside)
    (images / "ring").symlink_to(images / "ring")
    (images / "inside.png").symlink_to(images / "x.png")
    os.mkfifo(images / "pipe.png")
    intact = conversation("<image> what?", "a thing", image="inside.png")
    lines: list[Any] = []
    for line in _lines(random.Random(1)):
        lines += [intact, line] if len(lines) % INTACT == 0 else [line]
    paths = write_conversations(tmp_path, lines, {"x.png": picture(40, 40)})
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    with opened_files() as opened:
        streams = streams_of(tmp_path, {"vlm_sft": group(paths)}, tokenizer, max_num_tokens_per_sample=2000)
        skipped = _account(streams, tokenizer)
    bad = {row.place.row - 1 for row in streams[0].bad_rows}
    assert streams[0].rows == len(lines) - sum(not str(line).strip() for line in lines) > LINES
    assert not skipped and not [row for row in bad if lines[row] is intact]
    assert len(bad) > 150 and len(streams[0].too_long) == 1
    assert str(images / "x.png") in opened and not [path for path in opened if path.startswith(str(outside))]
    assert not [path for path in opened if path.startswith("/etc/hostname")]


def _odd_files(folder: Path) -> None:
    """Parquet files with faults that have a name."""
    image, text = picture(40, 40), json.dumps({"a": "text"})
    content: dict[str, dict[str, Any]] = {
        "no_rows": {"image": pa.array([], pa.binary()), "captions": pa.array([], pa.string())},
        "no_image": {"captions": [text]},
        "no_caption": {"image": [image]},
        "image_text": {"image": ["text"], "captions": [text]},
        "image_list": {"image": [[1.0, 2.0]], "captions": [text]},
        "image_struct": {"image": [{"path": "/etc/hostname", "bytes": None}], "captions": [text]},
        "image_null": {"image": pa.nulls(1), "captions": [text]},
        "caption_nan": {"image": [image], "captions": [float("nan")]},
        "caption_null": {"image": [image], "captions": pa.nulls(1)},
        "caption_binary": {"image": [image], "captions": [b"\xff\xfe"]},
        "caption_numbers": {"image": [image], "captions": [[1, 2]]},
        "caption_deep": {"image": [image], "captions": ["[" * 100_000]},
        "caption_half": {"image": [image], "captions": ['"\\ud800"']},
    }
    for name, columns in content.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    (folder / "directory.parquet").mkdir()
    for name, damage in (("nothing", b""), ("magic", b"PAR1"), ("text", b"no parquet" * 50)):
        (folder / f"{name}.parquet").write_bytes(damage)


def test_damaged_parquet_files(tmp_path: Path) -> None:
    rng, folder = random.Random(2), tmp_path / "rows"
    folder.mkdir()
    _odd_files(folder)
    pq.write_table(pa.Table.from_pylist(t2i_rows(4)), folder / "0_intact.parquet", row_group_size=2)
    whole = (folder / "0_intact.parquet").read_bytes()
    for i in range(FILES):
        # half of them in the footer, which is where it says how to read the rest
        content = whole[:-600] + damaged(whole[-600:], rng) if i % 2 else damaged(whole, rng)
        (folder / f"damaged_{i:03d}.parquet").write_bytes(content)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    with opened_files() as opened:
        streams = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(folder)})}, tokenizer)
        skipped = _account(streams, tokenizer)
    per_file = Counter(Path(bad.place.file).stem for bad in streams[0].bad_rows if bad.place.row < 0)
    assert per_file.keys() >= {"no_image", "nothing", "magic", "text"} and set(per_file.values()) == {1}
    rows = {Path(bad.place.file).stem for bad in streams[0].bad_rows if bad.place.row >= 0}
    assert rows >= {"image_text", "image_list", "image_struct", "image_null", "caption_nan", "caption_deep"}
    assert "directory" not in rows | per_file.keys()
    assert "0_intact" not in rows | per_file.keys()
    assert "/etc/hostname" not in opened
    intact = [plan for row in range(4) if (plan := streams[0].plan_sample(row, 0))]
    assert len(intact) == 4 and not {plan.row for plan in intact} & skipped.keys()


def test_a_file_damaged_after_it_was_indexed_costs_its_own_samples_only(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(t2i_rows(6)), folder / f"{name}.parquet", row_group_size=3)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    streams = streams_of(tmp_path, {"t2i_pretrain": group({"data_dir": str(folder)})}, tokenizer)
    plans: list[SamplePlan] = [plan for row in range(12) if (plan := streams[0].plan_sample(row, 0))]
    expected = materialize(plans[6:], streams, tokenizer, LayoutOptions(), 0)
    whole = (folder / "a.parquet").read_bytes()
    rng = random.Random(3)
    for i in range(60):
        (folder / "a.parquet").write_bytes(damaged(whole, rng))
        raw_rows.forget_open_files()
        for plan in plans if i % 2 else []:
            streams[0].reader.expect(streams[0].address(plan.row))
        batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
        assert len(batch.samples) + len(batch.skipped) == 12
        assert batch.samples[-6:] == expected.samples
        assert all(torch.equal(*pair) for pair in zip(batch.images[-6:], expected.images, strict=True))
