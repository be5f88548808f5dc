"""docs/data.md: every example on the page is run."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.cli.main import main
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import SampleOptions
from tests.small_data import (
    INTERLEAVE_SCHEMA,
    NO_DROPOUT,
    byte_tokenizer,
    group,
    picture,
    streams_of,
    write_conversations,
    write_parquet,
)

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def _block(name: str) -> str:
    """The code block whose first line is ```name."""
    found = re.search(rf"^ *```{name}\n(.*?)^ *```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found, f"docs/data.md has no block {name}"
    return textwrap.dedent(found[1])


def _row(name: str) -> Any:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return picture(64, 48) if value == "<bytes>" else value

    return {key: filled(value) for key, value in json.loads(_block(f"json {name}")).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example rows of the page at the paths of its dataset_info."""
    example, images = tmp_path / "bagel_example", tmp_path / "bagel_example" / "vlm" / "images" / "sub"
    write_parquet(example / "t2i" / "part-000.parquet", [_row("t2i")])
    write_parquet(example / "editing" / "seedxedit_multi" / "part-000.parquet", [_row("edit")])
    images.mkdir(parents=True)
    for path in (images.parent / "a.png", images / "b.png"):
        path.write_bytes(picture(64, 48))
    (example / "vlm" / "llava_ov_si.jsonl").write_text(_block("json vlm"))
    output = tmp_path / "BlockMovingSFT" / "data" / "output"
    write_parquet(output / "train_split.parquet", [_row("interleave")], schema=INTERLEAVE_SCHEMA)
    return tmp_path


@pytest.mark.parametrize(("dialect", "groups"), [("dialect-a", 3), ("dialect-b", 1)])
def test_the_example_rows_and_configs_give_samples(folder: Path, dialect: str, groups: int) -> None:
    (folder / "config.yaml").write_text(_block(f"yaml {dialect}"))
    (folder / "dataset_info.yaml").write_text(_block("yaml dataset-info"))
    config = load_dataset_config(str(folder / "config.yaml"))
    tokenizer = byte_tokenizer(folder / "tokenizer")
    streams = open_streams(config, tokenizer, SampleOptions(**NO_DROPOUT), str(folder / "index"), False)
    assert len(streams) == groups
    for stream in streams:
        assert not stream.bad_rows
        assert all(stream.plan_sample(row, 0) is not None for row in range(stream.rows))


def test_the_python_dataset_info_is_read(folder: Path) -> None:
    (folder / "config.yaml").write_text("t2i_pretrain: {dataset_names: [t2i]}\nvlm_sft: {dataset_names: [llava_ov]}\n")
    (folder / "dataset_info.py").write_text(_block("python dataset-info"))
    assert len(load_dataset_config(str(folder / "config.yaml")).groups) == 2


def test_own_data_as_the_page_prepares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_bytes(picture(600, 500, kind="JPEG"))
    (tmp_path / "pictures" / "cat.txt").write_text("a cat")
    (tmp_path / "my_data.yaml").write_text(_block("yaml own-config"))
    monkeypatch.chdir(tmp_path)
    exec(compile(_block("python own-data"), "docs/data.md", "exec"), {})
    config = load_dataset_config("my_data.yaml")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    (stream,) = open_streams(config, tokenizer, SampleOptions(), str(tmp_path / "index"), False)
    assert stream.rows == 1 and stream.plan_sample(0, 0) is not None


def test_what_people_have_is_converted_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    Path("pictures/sub").mkdir(parents=True)
    for name in ("pictures/cat.jpg", "pictures/sub/dog.png"):
        Path(name).write_bytes(picture(64, 48, kind="PNG" if name.endswith("png") else "JPEG"))
        Path(name).with_suffix(".txt").write_text("An animal.")
    Path("captions.csv").write_text("image,caption\npictures/cat.jpg,A cat.\n")
    edit = {"source": "pictures/cat.jpg", "target": "pictures/sub/dog.png", "instruction": "make it a dog"}
    Path("pairs.jsonl").write_text(json.dumps(edit))
    Path("llava.json").write_text(json.dumps([{"image": "pictures/cat.jpg", "conversations": turns}]))
    commands = [shlex.split(line, comments=True)[1:] for line in _block("bash convert").splitlines()]
    assert [main(words) for words in commands] == [0] * 4
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    for name, rows in (("mine", 2), ("captions", 1), ("pairs", 1), ("llava", 1)):
        config = load_dataset_config(f"data/{name}.yaml")
        (stream,) = open_streams(config, tokenizer, SampleOptions(), str(tmp_path / "index"), False)
        assert stream.rows == rows and not stream.bad_rows


def test_the_video_row_gives_a_sample(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra `video`)")
    row = _row("video")
    path = tmp_path / "images" / row["video"]
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    groups = {"vlm_sft": group(write_conversations(tmp_path, [row]))}
    (stream_of_rows,) = streams_of(tmp_path, groups, byte_tokenizer(tmp_path / "tokenizer"))
    plan = stream_of_rows.plan_sample(0, 0)
    assert plan is not None and 8 <= sum(entry.kind == "vit_image" for entry in plan.entries) <= 12
