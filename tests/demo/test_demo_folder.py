"""The demo folder: layout, columns, determinism, and what it refuses to overwrite."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError

EDITING = "bagel_example/editing"
MODEL_FILES = {
    *(
        "llm_config.json",
        "vit_config.json",
        "config.json",
        "generation_config.json",
        "ae.safetensors",
        "ema.safetensors",
    ),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def rows(*files: Path) -> list[dict[str, Any]]:
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_the_layout_is_that_of_the_published_folders(demo: Path) -> None:
    assert {path.name for path in demo.iterdir()} == {
        *("model", "data", "example.yaml", "dataset_info.yaml", "blockmoving_sft.yaml"),
    }
    assert {path.name for path in (demo / "model").iterdir()} == MODEL_FILES
    example = demo / "data" / "bagel_example"
    assert {path.name for path in example.iterdir()} == {"t2i", "editing", "vlm"}
    assert {path.name for path in (example / "editing").iterdir()} == {"seedxedit_multi", "parquet_info"}
    assert {path.name for path in (example / "vlm").iterdir()} == {"images", "llava_ov_si.jsonl"}
    assert {path.name for path in (demo / "data" / "blockmoving").iterdir()} == {
        *("train_split.parquet", "test_split.parquet", "train_split_info.json", "test_split_info.json"),
    }


@pytest.mark.parametrize("folder", ["t2i", "editing/seedxedit_multi"])
def test_there_are_several_parquet_files_of_several_row_groups(demo: Path, folder: str) -> None:
    files = list((demo / "data" / "bagel_example" / folder).glob("*.parquet"))
    assert len(files) >= 2
    assert all(pq.read_metadata(file).num_row_groups >= 2 for file in files)


def test_t2i_rows_hold_a_picture_and_several_captions(demo: Path) -> None:
    for row in rows(*(demo / "data" / "bagel_example" / "t2i").glob("*.parquet")):
        assert set(row) == {"image", "captions"}
        captions = json.loads(row["captions"])
        assert len(captions) > 1 and all(isinstance(text, str) and text for text in captions.values())
        assert 64 <= min(picture(row["image"]).size)


def test_edit_rows_hold_pairs_and_chains_with_instructions_between(demo: Path) -> None:
    lengths = set()
    for row in rows(*(demo / "data" / "bagel_example" / "editing" / "seedxedit_multi").glob("*.parquet")):
        images = [picture(data) for data in row["image_list"]]
        assert len(row["instruction_list"]) == len(images) - 1
        assert all(alternatives and all(alternatives) for alternatives in row["instruction_list"])
        assert len({image.size for image in images}) == 1
        assert all(
            a.convert("RGB").tobytes() != b.convert("RGB").tobytes() for a, b in zip(images, images[1:], strict=False)
        )
        lengths.add(len(images))
    assert lengths == {2, 3}


def test_vlm_lines_name_existing_pictures_once_per_tag(demo: Path) -> None:
    folder = demo / "data" / "bagel_example" / "vlm"
    pictures, turns = set(), set()
    for line in map(json.loads, (folder / "llava_ov_si.jsonl").read_text().splitlines()):
        named = line.get("image", [])
        names = [named] if isinstance(named, str) else named
        assert all(picture((folder / "images" / name).read_bytes()).size for name in names)
        speakers = [turn["from"] for turn in line["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2) and speakers
        assert sum(turn["value"].count("<image>") for turn in line["conversations"]) == len(names)
        pictures.add(len(names))
        turns.add(len(speakers) // 2)
    assert pictures == {0, 1, 2} and turns == {1, 2, 3}


@pytest.mark.parametrize(
    ("info", "data"),
    [
        (
            "bagel_example/editing/parquet_info/seedxedit_multi_nas.json",
            "bagel_example/editing/seedxedit_multi/*.parquet",
        ),
        ("blockmoving/train_split_info.json", "blockmoving/train_split.parquet"),
        ("blockmoving/test_split_info.json", "blockmoving/test_split.parquet"),
    ],
)
def test_parquet_info_is_keyed_by_path_and_counts_row_groups(demo: Path, info: str, data: str) -> None:
    listed = json.loads((demo / "data" / info).read_text())
    files = {str(path.relative_to(demo)): pq.read_metadata(path) for path in (demo / "data").glob(data)}
    assert {name: entry["num_row_groups"] for name, entry in listed.items()} == {
        name: footer.num_row_groups for name, footer in files.items()
    }


def test_the_configs_name_each_other_and_the_true_counts(demo: Path) -> None:
    info = yaml.safe_load((demo / "dataset_info.yaml").read_text())
    example = yaml.safe_load((demo / "example.yaml").read_text())
    blockmoving = yaml.safe_load((demo / "blockmoving_sft.yaml").read_text())
    assert list(example) == ["t2i_pretrain", "unified_edit", "vlm_sft", "interleave_reasoning"]
    assert blockmoving == {
        "data_weights": {"interleave_reasoning": 1.0},
        "data_names": {"interleave_reasoning": ["blockmoving_train"]},
    }
    for group, config in [*example.items(), ("interleave_reasoning", {"dataset_names": ["blockmoving_train"]})]:
        assert all(name in info[group] for name in config["dataset_names"])
    for group, name in (("t2i_pretrain", "t2i"), ("unified_edit", "seedxedit_multi")):
        files = list((demo / info[group][name]["data_dir"]).glob("*.parquet"))
        assert info[group][name]["num_files"] == len(files) == example[group]["num_used_data"][0]
        assert info[group][name]["num_total_samples"] == len(rows(*files))
    lines = (demo / info["vlm_sft"]["llava_ov"]["jsonl_path"]).read_text().splitlines()
    assert info["vlm_sft"]["llava_ov"]["num_total_samples"] == len(lines) == example["vlm_sft"]["num_used_data"][0]


@pytest.mark.parametrize("name", ["example.yaml", "blockmoving_sft.yaml"])
def test_the_configs_are_read_without_a_fault_from_any_folder(
    demo: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagel_ds.data.config.dataset_config import load_dataset_config

    monkeypatch.chdir(tmp_path)
    groups = load_dataset_config(str(demo / name)).groups
    assert all(Path(file).is_file() for group in groups for dataset in group.datasets for file in dataset.files)


def test_the_same_seed_writes_the_same_bytes_in_another_process(demo: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    code = "import sys, pathlib; from bagel_ds.demo import write_demo; write_demo(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env=environment, capture_output=True)
    assert digests(again) == digests(demo)


def test_another_seed_writes_other_data_and_weights(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "other", seed=1)
    ours, other = digests(demo), digests(tmp_path / "other")
    for name in (
        "model/ema.safetensors",
        "data/bagel_example/t2i/00000.parquet",
        "data/blockmoving/train_split.parquet",
    ):
        assert ours[name] != other[name]


def test_an_earlier_demo_is_overwritten_and_results_beside_it_stay(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    write_demo(out)
    first = digests(out)
    (out / "results").mkdir()
    (out / "results" / "log.txt").write_text("kept")
    (out / "model" / "llm_config.json").write_text("damaged")
    write_demo(out)
    assert digests(out) == {**first, "results/log.txt": hashlib.sha256(b"kept").hexdigest()}


def test_a_checkpoint_that_shares_a_file_with_the_earlier_demo_keeps_it(tmp_path: Path) -> None:
    out, kept = tmp_path / "demo", tmp_path / "ae.safetensors"
    write_demo(out)
    kept.hardlink_to(out / "model" / "ae.safetensors")
    before = kept.read_bytes()
    write_demo(out, seed=1)
    assert kept.read_bytes() == before != (out / "model" / "ae.safetensors").read_bytes()


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "llm_config.json").write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(UserError, match=r"holds other files \(model\).*new or empty folder"):
        write_demo(tmp_path)
    assert digests(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match=r"--out .*demo is a file"):
        write_demo(tmp_path / "demo")


def test_a_parent_that_is_a_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_demo(tmp_path / "taken" / "demo")
