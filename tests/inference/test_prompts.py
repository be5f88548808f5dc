"""A file of prompts for training: all its faults at once, and how its prompts are dealt."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.errors import UserError
from bagel_ds.inference.prompts import Prompts, open_prompts
from bagel_ds.model.shape.config import BagelConfig

MODEL, LAYOUT = BagelConfig(), LayoutOptions()
SMALL = {"image_shapes": [64, 64], "num_timesteps": 5}


def opened(folder: Path, rows: list[Any], model: BagelConfig = MODEL, max_tokens: int = 1000) -> Prompts:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return open_prompts(file, model, LAYOUT, max_tokens)


def test_every_bad_line_is_in_one_message(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat"},
        "{",
        {"prompt": ""},
        {"prompt": "x", "image": "nowhere.png"},
        {"prompt": "x", "num_timestep": 3},
        {"prompt": "x", "image_shapes": [60, 64]},
        {"prompt": "x", "enable_taylorseer": True},
        {"prompt": "x", "seed": "one"},
        {"prompt": "x", "lora": "cat"},
    ]
    with pytest.raises(UserError) as raised:
        opened(tmp_path, rows)
    text = str(raised.value)
    assert "--sample_prompts" in text
    for line, words in {
        2: "not JSON",
        3: "the prompt is empty",
        4: f"image {tmp_path / 'nowhere.png'}",
        5: "did you mean num_timesteps",
        6: "multiples of 16",
        7: "enable_taylorseer",
        8: "seed is 'one'",
        9: "lora chooses among the adapters of bagel-ds generate",
    }.items():
        assert any(f"line {line}: " in found and words in found for found in text.splitlines()), words
    assert "line 1:" not in text


@pytest.mark.parametrize("rows", [[], ["", " "]])
def test_a_file_without_prompts_is_refused(rows: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prompts"):
        opened(tmp_path, rows)


def test_what_the_run_leaves_out_can_not_be_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    seen = {"prompt": "what?", "image": "x.png", "mode": "vqa"}
    with pytest.raises(UserError, match="--visual_und False"):
        opened(tmp_path, [seen], dataclasses.replace(MODEL, visual_und=False))
    with pytest.raises(UserError, match="can't draw: --visual_gen False"):
        opened(tmp_path, [{"prompt": "a cat"}], dataclasses.replace(MODEL, visual_gen=False))
    assert len(opened(tmp_path, [seen], dataclasses.replace(MODEL, visual_gen=False)).jobs) == 1


def test_prompts_are_dealt_in_turn_and_in_batches_that_fit(tmp_path: Path) -> None:
    found = opened(tmp_path, [{"prompt": "p", **SMALL} for _ in range(7)], max_tokens=80)
    dealt = [[[job.name for job, _ in batch] for batch in found.batches(rank, 2)] for rank in range(2)]
    assert dealt == [
        [["000000", "000002"], ["000004", "000006"]],
        [["000001", "000003"], ["000005"]],
    ]  # a call draws two branches of 16 tokens and two markers for each
    assert found.calls(2) == 2 * (2 + 4)
    assert found.memory(2, average=False).tokens == 2 * 2 * 18
    assert found.batches(8, 9) == [] and not found.draws(8, 9)


def test_seeds_and_names_are_those_of_the_command(tmp_path: Path) -> None:
    found = opened(tmp_path, [{"prompt": "a", **SMALL}, {"prompt": "b", "seed": 9}, {"prompt": "c"}])
    assert [(job.name, request.seed) for job, request in zip(found.jobs, found.requests)] == [
        ("000000", 0), ("000001", 9), ("000002", 2),
    ]  # fmt: skip
