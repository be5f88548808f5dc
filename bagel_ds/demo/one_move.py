"""One-move puzzles of BlockMoving: a task that the demo's network learns within minutes.

`python -m bagel_ds.demo.one_move DEMO_DIR` adds them to a folder that `bagel-ds demo` wrote. One picture shows the
board, a block and the goal, a black cell; the answer is the direction in which the block slides to the goal.
Guarantees: the slide ends exactly on the goal, all directions are equally frequent in both splits, and no test board
(block and walls) is in the training rows. A cell is one ViT patch, so that no feature of a picture must be learned;
the model folder gets the size of these pictures, so that inference reads them as training does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from bagel_ds.demo.blockmoving import DIRECTIONS, FLOOR, WALL, Board, Cell
from bagel_ds.demo.scenes import COLORS, encode
from bagel_ds.machine.output import run_command

FOLDER = "one_move"
SIDE, CELL = 4, 14  # cells per side, pixels per side of a cell
MAX_WALLS = 3
BLOCK, GOAL = "red", "black"
QUESTION = "Which way?"

DATASET_INFO = """# Where the one-move puzzles are; paths are relative to this file.
vlm_sft:
  one_move_train:
    data_dir: images
    jsonl_path: train.jsonl
  one_move_test:
    data_dir: images
    jsonl_path: test.jsonl
"""

CONFIG = """# One-move puzzles, {split} rows.
vlm_sft:
  dataset_names:
  - one_move_{split}
  image_transform_args:
    image_stride: 14
    max_image_size: {size}
    min_image_size: {size}
  is_mandatory: true
  weight: 1
"""


def random_board(rng: random.Random) -> Board:
    """A block and one to three walls."""
    cells = rng.sample([(row, column) for row in range(SIDE) for column in range(SIDE)], 1 + rng.randint(1, MAX_WALLS))
    return Board(frozenset(cells[1:]), ((BLOCK, cells[0]),), SIDE, SIDE)


def draw(board: Board, goal: Cell) -> Image.Image:
    """The board with its goal as an RGB picture; each cell has one color."""
    picture = Image.new("RGB", (SIDE * CELL, SIDE * CELL), FLOOR)
    pen = ImageDraw.Draw(picture)
    colored = [(WALL, cell) for cell in board.walls] + [(COLORS[name], cell) for name, cell in board.blocks]
    for color, (row, column) in [*colored, (COLORS[GOAL], goal)]:
        pen.rectangle([column * CELL, row * CELL, (column + 1) * CELL - 1, (row + 1) * CELL - 1], fill=color)
    return picture


def puzzles(rng: random.Random, count: int) -> list[tuple[Board, str]]:
    """`count` different boards, each with a direction in which its block can slide: up, down, left, right, up, ..."""
    found: dict[Board, str] = {}
    while len(found) < count:
        direction = list(DIRECTIONS)[len(found) % len(DIRECTIONS)]
        board = random_board(rng)
        if board not in found and board.slide((BLOCK, direction)) != board:
            found[board] = direction
    return list(found.items())


def write_one_move(root: Path, rng: random.Random, train_rows: int = 2000, test_rows: int = 200) -> Path:
    """Write pictures, train.jsonl, test.jsonl, a dataset YAML for each and their dataset_info to `root`/one_move."""
    folder = root / FOLDER
    (folder / "images").mkdir(parents=True, exist_ok=True)
    made = puzzles(rng, train_rows + test_rows)
    for split, chosen in (("train", made[:train_rows]), ("test", made[train_rows:])):
        lines = [json.dumps(_row(folder, f"{split}_{number:04d}", *each)) for number, each in enumerate(chosen)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.yaml").write_text(CONFIG.format(split=split, size=SIDE * CELL))
    (folder / "dataset_info.yaml").write_text(DATASET_INFO)
    return folder


def _row(folder: Path, name: str, board: Board, direction: str) -> dict[str, Any]:
    """One line of the data; writes its picture. `answer` is what the metric of `bagel-ds demo` compares with."""
    goal = dict(board.slide((BLOCK, direction)).blocks)[BLOCK]
    (folder / "images" / f"{name}.png").write_bytes(encode(draw(board, goal)))
    return {
        "id": name,
        "image": f"{name}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": direction},
        ],
        "answer": direction,
    }


def show_at_this_size(model: Path) -> None:
    """Name the pictures' size for the ViT in the `image_sizes` of a model folder, which its checkpoints keep."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["image_sizes"]["vit"] = [SIDE * CELL, SIDE * CELL]
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Add the one-move puzzles to a demo's folder, and their size to its model."""
    parser = argparse.ArgumentParser(prog="python -m bagel_ds.demo.one_move", description=main.__doc__)
    parser.add_argument("demo", type=Path, help="folder that `bagel-ds demo` wrote")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_one_move(options.demo, random.Random(f"{options.seed}/{FOLDER}"))
    show_at_this_size(options.demo / "model")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
