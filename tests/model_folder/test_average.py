"""Average or weights: the one rule, on both sides of its threshold, for every kind of folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bagel_ds.errors import UserError
from bagel_ds.model_folder.average import Averaging, average_or_weights, averaging_of


def folder_with(folder: Path, *stems: str, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for stem in stems:
        save_file({"a": torch.zeros(2)}, folder / f"{stem}.safetensors", metadata if stem == "ema" else None)
    return folder


def trainer(steps: int, decay: float, **more: Any) -> dict[str, Any]:
    return {"steps_done": steps, "arguments": {"ema": decay}, **more}


@pytest.mark.parametrize(
    "steps, decay, stem",
    [
        (6931, 0.9999, "model"),  # half-life 6931.1
        (6932, 0.9999, "ema"),
        (0, 0.5, "model"),  # half-life 1
        (1, 0.5, "ema"),
        (10**9, 1.0, "model"),  # never moves
        (1, 0.0, "ema"),
    ],
)
@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_weights_are_chosen_exactly_where_the_half_life_exceeds_the_run(
    kind: str, steps: int, decay: float, stem: str, tmp_path: Path
) -> None:
    metadata = Averaging(steps, decay).metadata() if kind == "export" else None
    folder_with(tmp_path, "ema", "model", metadata=metadata)
    if kind == "checkpoint":
        (tmp_path / "trainer.json").write_text(json.dumps(trainer(steps, decay)))
    assert averaging_of(tmp_path) == Averaging(steps, decay)
    choice = average_or_weights(tmp_path)
    assert choice.stem == stem and f"{steps:,}" in choice.why


def test_skipped_updates_do_not_count_as_steps(tmp_path: Path) -> None:
    folder_with(tmp_path, "ema", "model")
    (tmp_path / "trainer.json").write_text(json.dumps(trainer(6940, 0.9999, skipped_updates=9)))
    assert average_or_weights(tmp_path).stem == "model"
    (tmp_path / "trainer.json").write_text(json.dumps(trainer(6940, 0.9999, skipped_updates=8)))
    assert average_or_weights(tmp_path).stem == "ema"


@pytest.mark.parametrize("recorded", [None, {"steps_done": 3, "plan_state": None}])
def test_folders_that_record_no_numbers_give_the_average(recorded: dict[str, Any] | None, tmp_path: Path) -> None:
    folder_with(tmp_path, "ema", "model")
    if recorded is not None:
        (tmp_path / "trainer.json").write_text(json.dumps(recorded))
    choice = average_or_weights(tmp_path)
    assert choice.stem == "ema" and "does not record" in choice.why


@pytest.mark.parametrize("stem, absent", [("ema", "model.safetensors"), ("model", "ema.safetensors")])
def test_the_only_file_is_chosen_whatever_the_numbers(stem: str, absent: str, tmp_path: Path) -> None:
    folder_with(tmp_path, stem)
    for steps in (1, 10**6):
        (tmp_path / "trainer.json").write_text(json.dumps(trainer(steps, 0.9999)))
        assert average_or_weights(tmp_path) == (stem, f"the folder holds no {absent}")


def test_shards_count_as_the_file_and_carry_the_numbers(tmp_path: Path) -> None:
    folder_with(tmp_path, "ema", "model", metadata=Averaging(5, 0.9999).metadata())
    (tmp_path / "ema.safetensors").rename(tmp_path / "ema-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "ema-00001-of-00001.safetensors"}}
    (tmp_path / "ema.safetensors.index.json").write_text(json.dumps(index))
    assert average_or_weights(tmp_path).stem == "model"


def test_a_folder_without_weights_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither model.safetensors nor ema.safetensors"):
        average_or_weights(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"steps_done": 3, "arguments": {"ema": "much"}}'])
def test_a_broken_trainer_json_is_a_message(text: str, tmp_path: Path) -> None:
    folder_with(tmp_path, "ema", "model")
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(UserError, match=r"trainer.json can't be read .*Copy the checkpoint again, or remove"):
        average_or_weights(tmp_path)


def test_broken_metadata_is_a_message(tmp_path: Path) -> None:
    folder_with(tmp_path, "ema", "model", metadata={"training_steps": "many", "ema_decay": "0.5"})
    with pytest.raises(UserError, match="ema.safetensors: its metadata holds training_steps 'many'"):
        average_or_weights(tmp_path)
