"""Three data sets of pictures like photographs: texts to draw, edits, conversations; JPEG of 512-1344 px.

Guarantees: equal arguments write equal files. The transforms are those that the kinds of data have by default, so a
picture becomes 1,024 to 4,096 tokens to draw and up to 4,900 to read.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

GROUPS = {"t2i": "t2i_pretrain", "edit": "unified_edit", "vlm": "vlm_sft"}
WORDS = "a red blue small large house tree river street under over light dark person with dog cat window".split()


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG like a photograph: smooth shapes and some grain; about 0.3 MB per megapixel."""
    width, height = rng.integers(512, 1345, 2).tolist()
    shapes = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
    pixels = np.clip(np.asarray(shapes).astype(np.int16) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def write_photo_sets(folder: Path, rows: int, rng: np.random.Generator) -> Path:
    """`rows` rows in each of the three data sets; the dataset config that names them."""
    drawn = [
        {"image": picture(rng), "captions": json.dumps({"a": words(rng, 60), "b": words(rng, 20)})} for _ in range(rows)
    ]
    edits = [
        {"image_list": [picture(rng), picture(rng)], "instruction_list": [[words(rng, 15), words(rng, 12)]]}
        for _ in range(rows)
    ]
    for name, content in (("t2i", drawn), ("edit", edits)):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(content), folder / name / "a.parquet", row_group_size=100)
    (folder / "vlm" / "images").mkdir(parents=True)
    lines = []
    for i in range(rows):
        (folder / "vlm" / "images" / f"{i}.jpg").write_bytes(picture(rng))
        turns = [
            {"from": "human", "value": f"<image>\n{words(rng, 20)}"},
            {"from": "gpt", "value": words(rng, 120)},
        ]
        lines.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}) + "\n")
    (folder / "vlm" / "data.jsonl").write_text("".join(lines))
    return _write_config(folder)


def _write_config(folder: Path) -> Path:
    paths = {"vlm": f"data_dir: {folder}/vlm/images, jsonl_path: {folder}/vlm/data.jsonl"}
    config = (
        f"{kind}: {{dataset_names: [{{name: {name}, {paths.get(name, f'data_dir: {folder}/{name}')}}}]}}\n"
        for name, kind in GROUPS.items()
    )
    (folder / "data.yaml").write_text("".join(config))
    return folder / "data.yaml"
