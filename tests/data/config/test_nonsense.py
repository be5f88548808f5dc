"""Whatever stands at whatever key of a dataset config or dataset_info: it is used, or one message names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.errors import UserError
from tests import nonsense
from tests.small_data import t2i_rows, write_conversations, write_parquet

STEPS = [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.soak)]
IN_PYTHON = nonsense.IN_JSON | {
    "call": "f(x)",
    "3000_signs": "-" * 3000 + "1",
    "set": "{1, 2}",
    "mapping_as_key": "{{}: 1}",
    "complex": "1j",
    "bytes": "b'x'",
    "ellipsis": "...",
    "unpacked": "{**a}",
    "escape": r"'\d'",
}


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Any]:
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(1))
    t2i = {"data_dir": str(tmp_path / "t2i"), "num_files": 1, "parquet_info_path": "x.json", "parquet": "a.parquet"}
    return {"t2i_pretrain": {"t2i": t2i}, "vlm_sft": {"talks": write_conversations(tmp_path / "vlm", [])}}


def _dialect_a(entries: dict[str, Any]) -> dict[str, Any]:
    size = {"image_stride": 16, "max_image_size": 64, "min_image_size": 32}
    return {
        "t2i_pretrain": {
            "dataset_names": ["t2i", {"name": "own", "data_dir": "t2i", "parquet": ["a.parquet"]}],
            "image_transform_args": size,
            "num_used_data": [1, 1],
            "is_mandatory": True,
            "weight": 1,
            "kind": "t2i_pretrain",
        },
        "vlm_sft": {
            "dataset_names": [{"name": "talks", **entries["vlm_sft"]["talks"], "linked_dirs": ["t2i"]}],
            "frame_sampler_args": {"max_num_frames": 3, "min_num_frames": 2},
            "shuffle_lines": True,
            "shuffle_seed": 1,
            "num_used_data": [3],
        },
    }


DIALECT_B = {"data_weights": {"t2i_pretrain": 1.0}, "data_names": {"t2i_pretrain": ["t2i"]}}


def _check(messages: list[str | None], folder: Path) -> None:
    """Some are refused and some are not, and each message names a file and stays short."""
    refused = [message for message in messages if message is not None]
    assert 0 < len(refused) < len(messages)
    assert [message for message in refused if str(folder) not in message] == []
    assert max(map(len, refused)) < 20_000


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dialect", ["a", "b"])
def test_any_value_anywhere_in_a_config(tmp_path: Path, entries: dict[str, Any], dialect: str, step: int) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(entries))
    path, messages = tmp_path / "data.yaml", []
    content = _dialect_a(entries) if dialect == "a" else DIALECT_B
    for text in nonsense.documents(content, nonsense.IN_YAML, yaml.safe_dump, step):
        path.write_text(text, encoding="utf-8")
        messages.append(nonsense.refusal(lambda: load_dataset_config(str(path))))
    _check(messages, tmp_path)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("form", ["yaml", "json", "py"])
def test_any_value_anywhere_in_dataset_info(tmp_path: Path, entries: dict[str, Any], form: str, step: int) -> None:
    config, path, messages = tmp_path / "data.yaml", tmp_path / f"info.{form}", []
    config.write_text(yaml.safe_dump(DIALECT_B | {"data_names": {"t2i_pretrain": ["t2i"], "vlm_sft": ["talks"]}}))
    values, write, before = {
        "yaml": (nonsense.IN_YAML, yaml.safe_dump, ""),
        "json": (nonsense.IN_JSON | nonsense.ONLY_JSON, json.dumps, ""),
        "py": (IN_PYTHON, json.dumps, "DATASET_INFO = "),
    }[form]
    for text in nonsense.documents(entries, values, write, step):
        path.write_text(before + text, encoding="utf-8")
        messages.append(nonsense.refusal(lambda: load_dataset_config(str(config), str(path))))
    _check(messages, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "DATASET_INFO = 3\nDATASET_INFO['a'] = 1",
        "DATASET_INFO = {}\nDATASET_INFO[[1]] = {}",
        "DATASET_INFO = {}\nDATASET_INFO[1:2] = 1",
        "DATASET_INFO = {}\nDATASET_INFO[f()] = 1",
        "DATASET_INFO = {'a': 3}\nDATASET_INFO['a']['b'] = 1",
        "DATASET_INFO = {}\nDATASET_INFO['a'] += 3",
        "DATASET_INFO, b = {}, 2",
        "DATASET_INFO.x = 3",
        "DATASET_INFO: dict",
        "if True:\n  DATASET_INFO = {}",
        "\0",
        "(" * 1000,
    ],
)
def test_strange_statements_of_a_python_info_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset_info.py").write_text(text)
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(DIALECT_B))
    with pytest.raises(UserError, match="dataset_info.py"):
        load_dataset_config(str(tmp_path / "data.yaml"))


def test_bounds_of_numbers_are_tested_from_both_sides(tmp_path: Path, entries: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(entries))

    def message(group: str, **changes: Any) -> str | None:
        name = next(iter(entries[group]))
        (tmp_path / "data.yaml").write_text(yaml.safe_dump({group: {"dataset_names": [name], **changes}}))
        return nonsense.refusal(lambda: load_dataset_config(str(tmp_path / "data.yaml")))

    for group, most in (("t2i_pretrain", 1_000_000), ("vlm_sft", 2**31 - 1)):
        assert message(group, num_used_data=[most]) is None
        assert "num_used_data" in (message(group, num_used_data=[most + 1]) or "")
    assert message("vlm_sft", shuffle_seed=2**31 - 1, weight=2**31 - 1) is None
    assert "shuffle_seed must be an integer" in (message("vlm_sft", shuffle_seed=2**31) or "")
    assert "weight must be" in (message("vlm_sft", weight=2**31) or "")
