"""Small data sets in every format, and a byte-level tokenizer, written by the tests that need them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from bagel_ds.data.config.dataset_config import DatasetConfig, load_dataset_config
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.model_folder.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
VAE_ARGS = {"image_stride": 16, "max_image_size": 96, "min_image_size": 32}
VIT_ARGS = {"image_stride": 14, "max_image_size": 84, "min_image_size": 28}
NO_DROPOUT = {"text_cond_dropout_prob": 0.0, "vit_cond_dropout_prob": 0.0, "vae_cond_dropout_prob": 0.0}


def byte_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """One id per byte, then the special tokens; written to folder/tokenizer.json and read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def picture(width: int, height: int, mode: str = "RGB", kind: str = "PNG", seed: int = 0) -> bytes:
    """Encoded bytes of a random image."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode=None)
    if image.mode != mode:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]], group_rows: int = 2, schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group_rows)
    return path


def t2i_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "image": picture(40 + 7 * i, 50 + 3 * i, seed=i),
            "captions": json.dumps({"a": f"picture {i}", "b": f"a longer caption of picture number {i}"}),
        }
        for i in range(first, first + count)
    ]


def edit_rows(count: int, images: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "image_list": [picture(48 + 8 * i, 64, seed=10 * i + k) for k in range(images)],
            "instruction_list": [[f"step {k}", f"or do step {k} of row {i}"] for k in range(images - 1)],
        }
        for i in range(count)
    ]


def interleave_row(question: list[Any], solution: list[Any], answer: str = "42", seed: int = 0) -> dict[str, Any]:
    """Items are texts, or numbers: the index of an image; as many images as the highest index says."""

    def items(values: list[Any]) -> list[dict[str, Any]]:
        return [
            {"type": "text", "content": value, "index": None}
            if isinstance(value, str)
            else {"type": "image", "content": "", "index": value}
            for value in values
        ]

    def images(values: list[Any]) -> list[bytes]:
        highest = max([value for value in values if isinstance(value, int)], default=-1)
        return [picture(40, 48 + 8 * i, seed=seed + i) for i in range(highest + 1)]

    return {
        "answer": answer,
        "question_interleave": items(question),
        "solution_interleave": items(solution),
        "question_images": images(question),
        "solution_images": images(solution),
    }


INTERLEAVE_SCHEMA = pa.schema(
    [
        ("answer", pa.string()),
        *(
            (
                f"{part}_interleave",
                pa.list_(pa.struct([("type", pa.string()), ("content", pa.string()), ("index", pa.int64())])),
            )
            for part in ("question", "solution")
        ),
        ("question_images", pa.list_(pa.binary())),
        ("solution_images", pa.list_(pa.binary())),
    ]
)


def write_conversations(folder: Path, lines: list[Any], images: dict[str, bytes] | None = None) -> dict[str, str]:
    """A jsonl file and its image folder; lines that are strings go in as they are. Returns the dataset's paths."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, content in (images or {}).items():
        (folder / "images" / name).write_bytes(content)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "data.jsonl").write_text(text)
    return {"data_dir": str(folder / "images"), "jsonl_path": str(folder / "data.jsonl")}


def conversation(*turns: str, image: Any = None) -> dict[str, Any]:
    """Turns of human and gpt by turns."""
    line: dict[str, Any] = {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    }
    return line if image is None else {**line, "image": image}


def group(paths: dict[str, Any], name: str = "data", **settings: Any) -> dict[str, Any]:
    """A group of a dataset config with its paths inline; small transforms unless given."""
    defaults: dict[str, Any] = {"image_transform_args": VIT_ARGS if "jsonl_path" in paths else VAE_ARGS}
    return {"dataset_names": [{"name": name, **paths}], **defaults, **settings}


def write_config(folder: Path, groups: dict[str, Any], name: str = "data.yaml") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(groups, sort_keys=False))
    return str(folder / name)


def config_of(folder: Path, groups: dict[str, Any]) -> DatasetConfig:
    return load_dataset_config(write_config(folder, groups))


def streams_of(folder: Path, groups: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> list[GroupStream]:
    """Streams of inline groups, without dropout unless asked for; the index is kept in folder/index."""
    sample_options = SampleOptions(**{**NO_DROPOUT, **options})
    return open_streams(config_of(folder, groups), tokenizer, sample_options, str(folder / "index"), False)


def mixed_groups(folder: Path) -> dict[str, Any]:
    """One group of every format, with every kind of row that can be used."""
    write_parquet(folder / "t2i" / "a.parquet", t2i_rows(5))
    write_parquet(folder / "edit" / "a.parquet", edit_rows(3, images=4) + edit_rows(2))
    rows = [
        interleave_row(["look", 0, "what?"], ["first", 0, "then", "so 42"]),
        interleave_row(["no picture"], [0, "because", 1]),
        interleave_row([0], ["text only"]),
    ]
    write_parquet(folder / "reason" / "a.parquet", rows, schema=INTERLEAVE_SCHEMA)
    lines = [
        conversation("<image> what?", "a thing", image="x.png"),
        conversation("compare <image> and <image>", "equal", "why?", "because", image=["x.png", "y.png"]),
        conversation("hello", "good day"),
    ]
    vlm = write_conversations(folder / "vlm", lines, {"x.png": picture(60, 40), "y.png": picture(30, 90)})
    vit = {"vit_image_transform_args": VIT_ARGS}
    return {
        "t2i_pretrain": group({"data_dir": str(folder / "t2i")}, "pictures"),
        "unified_edit": group({"data_dir": str(folder / "edit")}, "edits", **vit),
        "vlm_sft": group(vlm, "talks"),
        "interleave_reasoning": group({"data_dir": str(folder / "reason")}, "puzzles", **vit),
    }
