"""BlockMoving: the rules, the solutions and the rows."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from bagel_ds.demo.blockmoving import (
    CELL,
    COLUMNS,
    DIRECTIONS,
    MAX_MOVES,
    ROWS,
    SCHEMA,
    Board,
    draw_board,
    puzzle_row,
    random_puzzle,
    shortest_ways,
)
from bagel_ds.demo.scenes import COLORS


def board_rows(demo: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(demo / "data" / "blockmoving" / f"{split}_split.parquet").to_pylist()


def seen(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def read_board(image: Image.Image) -> Board:
    """The board of a picture, from the color in the middle of every cell."""
    names = {color: name for name, color in COLORS.items()}
    walls, blocks = set(), []
    for row in range(ROWS):
        for column in range(COLUMNS):
            pixel = image.getpixel((column * CELL + CELL // 2, row * CELL + CELL // 2))
            if pixel in names:
                blocks.append((names[pixel], (row, column)))
            elif pixel == (92, 92, 100):
                walls.add((row, column))
    return Board(frozenset(walls), tuple(sorted(blocks)))


def test_a_block_slides_to_the_border_to_a_wall_or_to_another_block() -> None:
    board = Board(frozenset({(0, 5)}), (("blue", (0, 9)), ("red", (0, 1))))
    assert dict(board.slide(("red", "right")).blocks)["red"] == (0, 4)
    assert dict(board.slide(("red", "left")).blocks)["red"] == (0, 0)
    assert dict(board.slide(("red", "down")).blocks)["red"] == (ROWS - 1, 1)
    assert dict(board.slide(("blue", "left")).blocks)["blue"] == (0, 6)
    free = Board(frozenset(), board.blocks)
    assert dict(free.slide(("red", "right")).blocks)["red"] == (0, 8)
    assert free.slide(("red", "up")) == free


@pytest.mark.parametrize("moves", range(1, MAX_MOVES + 1))
@pytest.mark.parametrize("seed", range(5))
def test_a_solution_reaches_its_goal_and_none_is_shorter(seed: int, moves: int) -> None:
    puzzle = random_puzzle(random.Random(seed), moves)
    assert len(puzzle.moves) == moves
    ways = shortest_ways(puzzle.start, moves)
    assert len(ways[puzzle.boards[-1]]) == moves
    assert puzzle.boards[-1] not in shortest_ways(puzzle.start, moves - 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_shows_exactly_the_board(seed: int) -> None:
    puzzle = random_puzzle(random.Random(seed), 2)
    for board in (puzzle.start, *puzzle.boards):
        assert read_board(draw_board(board)) == board


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_written_solution_leads_from_the_start_picture_to_the_goal_picture(demo: Path, split: str) -> None:
    for row in board_rows(demo, split):
        start, goal = (read_board(seen(data)) for data in row["question_images"])
        board = start
        moves = [tuple(move.split()) for move in row["answer"].split(", ")]
        assert len(moves) == len(row["solution_images"])
        for (color, direction), data in zip(moves, row["solution_images"], strict=True):
            assert direction in DIRECTIONS
            board = board.slide((color, direction))
            assert read_board(seen(data)) == board
        assert board == goal != start


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_have_the_interleaved_columns_and_name_every_picture_once(demo: Path, split: str) -> None:
    schema = pq.read_schema(demo / "data" / "blockmoving" / f"{split}_split.parquet")
    assert schema.names == SCHEMA.names
    for row in board_rows(demo, split):
        for part in ("question", "solution"):
            items = row[f"{part}_interleave"]
            assert [item["index"] for item in items if item["type"] == "image"] == list(
                range(len(row[f"{part}_images"]))
            )
            assert all(item["content"].strip() for item in items if item["type"] == "text")
        kinds = [item["type"] for item in row["solution_interleave"]]
        assert kinds == ["text", "image"] * len(row["solution_images"]) + ["text"]


def test_no_puzzle_is_in_both_splits_or_twice(demo: Path) -> None:
    questions = [tuple(row["question_images"]) for split in ("train", "test") for row in board_rows(demo, split)]
    assert len(questions) == len(set(questions))
    assert len(board_rows(demo, "train")) >= 50 and len(board_rows(demo, "test")) >= 5


def test_the_text_of_a_move_counts_the_cells() -> None:
    puzzle = random_puzzle(random.Random(0), 1)
    ((color, direction),) = puzzle.moves
    a, b = dict(puzzle.start.blocks)[color], dict(puzzle.boards[0].blocks)[color]
    cells = abs(a[0] - b[0]) + abs(a[1] - b[1])
    text = puzzle_row(puzzle)["solution_interleave"][0]["content"]
    assert f"the {color} block slides {direction} by {'one cell' if cells == 1 else f'{cells} cells'}" in text
