"""The one-move puzzles: what the rows say about their pictures, and that no test board is in the training rows."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel_ds.demo.blockmoving import DIRECTIONS, FLOOR, WALL, Cell
from bagel_ds.demo.one_move import BLOCK, CELL, GOAL, MAX_WALLS, SIDE, main, write_one_move
from bagel_ds.demo.scenes import COLORS
from bagel_ds.inference.loading import open_inferencer

TRAIN, TEST = 400, 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_one_move(tmp_path_factory.mktemp("demo"), random.Random(0), TRAIN, TEST)


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def cells(folder: Path, row: dict[str, Any]) -> dict[Cell, tuple[int, ...]]:
    """The color of every cell of a row's picture; each cell must have one color only."""
    found = {}
    with Image.open(folder / "images" / row["image"]) as picture:
        assert picture.size == (SIDE * CELL, SIDE * CELL)
        for line in range(SIDE):
            for column in range(SIDE):
                box = (column * CELL, line * CELL, (column + 1) * CELL, (line + 1) * CELL)
                ((_, found[line, column]),) = picture.convert("RGB").crop(box).getcolors()  # type: ignore[misc]
    return found


def test_every_answer_leads_from_the_block_to_the_goal(folder: Path) -> None:
    for row in rows(folder, "train") + rows(folder, "test"):
        assert row["conversations"][1] == {"from": "gpt", "value": row["answer"]}
        colors = cells(folder, row)
        assert 1 <= sum(color == WALL for color in colors.values()) <= MAX_WALLS
        (at,) = [cell for cell, color in colors.items() if color == COLORS[BLOCK]]
        (goal,) = [cell for cell, color in colors.items() if color == COLORS[GOAL]]
        step_row, step_column = DIRECTIONS[row["answer"]]
        passed = []
        while colors.get(at := (at[0] + step_row, at[1] + step_column), WALL) != WALL:
            passed.append(at)
        assert passed[-1] == goal, "the block stops there, and not before or behind"
        assert all(colors[cell] == FLOOR for cell in passed[:-1])


def test_no_board_is_in_both_splits_or_twice(folder: Path) -> None:
    boards = [
        tuple(FLOOR if color == COLORS[GOAL] else color for _, color in sorted(cells(folder, row).items()))
        for row in rows(folder, "train") + rows(folder, "test")
    ]
    assert len(set(boards)) == len(boards) == TRAIN + TEST


def test_guessing_one_direction_is_right_in_a_quarter_of_the_rows(folder: Path) -> None:
    for split, count in (("train", TRAIN), ("test", TEST)):
        found = Counter(row["answer"] for row in rows(folder, split))
        assert found == dict.fromkeys(DIRECTIONS, count // 4)


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_one_move(tmp_path, random.Random(0), TRAIN, TEST)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == TRAIN + TEST + 5
    for name in files:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_inference_reads_the_pictures_at_the_size_of_training(demo: Path, tmp_path: Path) -> None:
    """Resized to five patches per side, a cell would lie in several patches, and trained models answer wrongly."""
    shutil.copytree(demo / "model", tmp_path / "model")
    assert main([str(tmp_path)]) == 0
    network = open_inferencer(tmp_path / "model", "cpu").network
    for size in (SIDE * CELL, 64):  # as it is, and as the autoencoder gets it
        assert network.vit_transform.size(size, size) == (SIDE * CELL, SIDE * CELL)
