"""A launch over more rows than are indexed at once trains on the packs of one whose data were indexed beforehand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from bagel_ds.data.index.cache import BESIDE_DATA
from bagel_ds.data.streams.opening import AT_ONCE_ROWS
from tests.distributed.cases import arguments
from tests.launch import TRAIN, cpu_environment, deepspeed, free_port, run_to_end

pytestmark = [pytest.mark.distributed, pytest.mark.soak]

FILE_ROWS = 2000
FILES = AT_ONCE_ROWS // FILE_ROWS + 10


def write_data(folder: Path) -> Path:
    """More rows than `AT_ONCE_ROWS`: small pictures, captions of many lengths. Returns the dataset config."""
    (folder / "t2i").mkdir(parents=True)
    for number in range(FILES):
        buffer = io.BytesIO()
        Image.new("RGB", (64 + number % 3 * 16, 64), (number, 0, 99)).save(buffer, "PNG")
        captions = [json.dumps({"caption": f"number {number} " + "long " * (row % 40)}) for row in range(FILE_ROWS)]
        table = pa.table({"image": [buffer.getvalue()] * FILE_ROWS, "captions": captions})
        pq.write_table(table, folder / "t2i" / f"{number:03}.parquet", row_group_size=500)
    dataset = {"name": "many", "data_dir": str(folder / "t2i"), "num_files": FILES}
    resize = {"image_stride": 16, "max_image_size": 96, "min_image_size": 64}
    group = {"dataset_names": [dataset], "image_transform_args": resize, "is_mandatory": True}
    (folder / "data.yaml").write_text(yaml.safe_dump({"t2i_pretrain": group}))
    return folder / "data.yaml"


def test_training_begins_before_its_files_are_indexed_and_sees_the_same_packs(demo: Path, tmp_path: Path) -> None:
    config = write_data(tmp_path)
    short = {"dataset_config_file": config, "total_steps": 4, "precision": "fp32", "save_every": 100}
    entries = tmp_path / "t2i" / BESIDE_DATA

    early = deepspeed(TRAIN, arguments(demo, tmp_path / "early", **short), ranks=2)
    assert early.code == 0, early.output[-4000:]
    assert f"of {FILES} files are indexed first" in early.output
    assert "more files are indexed while training goes on" in early.output
    assert 0 < len(list(entries.glob("*.safetensors"))) <= FILES

    words = ["index", "--model_path", demo / "model", "--dataset_config_file", config, "--max_latent_size", 64]
    index = run_to_end(
        [sys.executable, "-m", "bagel_ds.cli.main", *map(str, words)], cpu_environment(), free_port(), 600
    )
    assert index.code == 0, index.output[-4000:]
    assert len(list(entries.glob("*.safetensors"))) == FILES
    whole = deepspeed(TRAIN, arguments(demo, tmp_path / "whole", **short), ranks=2)
    assert whole.code == 0, whole.output[-4000:]
    assert "files are indexed first" not in whole.output
    assert mse(tmp_path / "early") == mse(tmp_path / "whole")


def mse(results: Path) -> list[float]:
    return [json.loads(line)["loss/mse"] for line in (results / "metrics.jsonl").read_text().splitlines()]
