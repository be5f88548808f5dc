"""BlockMoving: puzzles of sliding colored blocks, drawn and solved by the program.

Rules: a block slides up, down, left or right until it meets the border, a wall or another block; the board must end up
like the goal. Guarantees: every puzzle is solvable, its solution is a shortest one (breadth-first search), and every
picture of the solution shows the board after the moves so far. The columns are those of interleaved reasoning data.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, ImageDraw

from bagel_ds.demo.parquet import write_info, write_parquet
from bagel_ds.demo.scenes import COLORS, encode, listing

# Four times as wide as high: the published transforms of interleaved data scale the long side to 512 pixels, so a
# picture costs 256 latent tokens instead of 1024, and puzzles of three moves stay below 4096 tokens.
ROWS, COLUMNS, CELL = 3, 12, 16  # CELL in pixels
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
BLOCK_COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
MAX_MOVES = 3
FLOOR, LINES, WALL = (246, 244, 238), (218, 214, 204), (92, 92, 100)

Cell = tuple[int, int]  # (row, column)
Move = tuple[str, str]  # (color, direction)

_PIECES = pa.list_(pa.struct([("type", pa.string()), ("content", pa.string()), ("index", pa.int64())]))
SCHEMA = pa.schema(
    [
        ("answer", pa.string()),
        ("question_interleave", _PIECES),
        ("solution_interleave", _PIECES),
        ("question_images", pa.list_(pa.binary())),
        ("solution_images", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True)
class Board:
    """Positions of walls and blocks. Blocks are (color, cell), sorted by color, so that equal boards compare equal."""

    walls: frozenset[Cell]
    blocks: tuple[tuple[str, Cell], ...]
    rows: int = ROWS
    columns: int = COLUMNS

    def slide(self, move: Move) -> Board:
        """The board after `move`; an equal board if the block can't move."""
        color, direction = move
        step_row, step_column = DIRECTIONS[direction]
        cells = dict(self.blocks)
        row, column = cells.pop(color)
        taken = self.walls | set(cells.values())
        while True:
            ahead = (row + step_row, column + step_column)
            if not (0 <= ahead[0] < self.rows and 0 <= ahead[1] < self.columns) or ahead in taken:
                break
            row, column = ahead
        return replace(self, blocks=tuple(sorted([*cells.items(), (color, (row, column))])))

    def moves(self) -> list[Move]:
        """All moves, including those that change nothing."""
        return [(color, direction) for color, _ in self.blocks for direction in DIRECTIONS]


@dataclass(frozen=True)
class Puzzle:
    start: Board
    moves: tuple[Move, ...]  # a shortest solution

    @property
    def boards(self) -> list[Board]:
        """The board after each move; the last one is the goal."""
        boards = [self.start]
        for move in self.moves:
            boards.append(boards[-1].slide(move))
        return boards[1:]


def shortest_ways(start: Board, depth: int) -> dict[Board, tuple[Move, ...]]:
    """Every board within `depth` moves of `start`, with a shortest solution."""
    ways: dict[Board, tuple[Move, ...]] = {start: ()}
    frontier = [start]
    for _ in range(depth):
        reached = []
        for board in frontier:
            for move in board.moves():
                after = board.slide(move)
                if after not in ways:
                    ways[after] = (*ways[board], move)
                    reached.append(after)
        frontier = reached
    return ways


def random_puzzle(rng: random.Random, moves: int) -> Puzzle:
    """A puzzle whose shortest solution has `moves` moves."""
    while True:
        cells = rng.sample([(row, column) for row in range(ROWS) for column in range(COLUMNS)], 6)
        colors = rng.sample(BLOCK_COLORS, rng.randint(2, 3))
        blocks = tuple(sorted(zip(colors, cells, strict=False)))
        start = Board(frozenset(cells[len(colors) : len(colors) + rng.randint(1, 3)]), blocks)
        solutions = [way for way in shortest_ways(start, moves).values() if len(way) == moves]
        if solutions:
            return Puzzle(start, rng.choice(solutions))


def draw_board(board: Board) -> Image.Image:
    """The board as an RGB picture, COLUMNS*CELL wide and ROWS*CELL high."""
    picture = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), FLOOR)
    pen = ImageDraw.Draw(picture)
    for column in range(1, COLUMNS):
        pen.line([(column * CELL, 0), (column * CELL, ROWS * CELL)], fill=LINES)
    for row in range(1, ROWS):
        pen.line([(0, row * CELL), (COLUMNS * CELL, row * CELL)], fill=LINES)
    for row, column in board.walls:
        pen.rectangle([column * CELL, row * CELL, (column + 1) * CELL - 1, (row + 1) * CELL - 1], fill=WALL)
    for color, (row, column) in board.blocks:
        box = [column * CELL + 2, row * CELL + 2, (column + 1) * CELL - 2, (row + 1) * CELL - 2]
        pen.rectangle(box, fill=COLORS[color])
    return picture


def _text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content, "index": 0}


def _image(index: int) -> dict[str, Any]:
    return {"type": "image", "content": "", "index": index}


def _move_text(board: Board, move: Move, after: Board, number: int) -> str:
    color, direction = move
    cells = abs(sum(b - a for a, b in zip(dict(board.blocks)[color], dict(after.blocks)[color], strict=True)))
    steps = "one cell" if cells == 1 else f"{cells} cells"
    return f"Move {number}: the {color} block slides {direction} by {steps} and stops."


def puzzle_row(puzzle: Puzzle) -> dict[str, Any]:
    """One row of the data set: a question with start and goal, a solution that alternates reasons and pictures."""
    names = listing([f"the {color} block" for color, _ in puzzle.start.blocks])
    boards = puzzle.boards
    answer = ", ".join(f"{color} {direction}" for color, direction in puzzle.moves)
    solution: list[dict[str, Any]] = []
    before = puzzle.start
    for number, (move, after) in enumerate(zip(puzzle.moves, boards, strict=True), 1):
        solution += [_text(_move_text(before, move, after, number)), _image(number - 1)]
        before = after
    solution.append(_text(f"The board looks like the goal. The answer is: {answer}."))
    return {
        "answer": answer,
        "question_interleave": [
            _text(
                f"On this board are {names}. A block slides until it meets the border, a grey wall or another block. "
                "This is the start:"
            ),
            _image(0),
            _text("This is the goal:"),
            _image(1),
            _text(
                f"Which {len(boards)} moves lead to the goal?" if len(boards) > 1 else "Which move leads to the goal?"
            ),
        ],
        "solution_interleave": solution,
        "question_images": [encode(draw_board(puzzle.start)), encode(draw_board(boards[-1]))],
        "solution_images": [encode(draw_board(board)) for board in boards],
    }


def random_rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """`count` different puzzles with 1, 2, 3, 1, 2, ... moves."""
    puzzles: dict[tuple[Board, Board], Puzzle] = {}
    while len(puzzles) < count:
        puzzle = random_puzzle(rng, 1 + len(puzzles) % MAX_MOVES)
        puzzles[puzzle.start, puzzle.boards[-1]] = puzzle
    return [puzzle_row(puzzle) for puzzle in puzzles.values()]


def write_blockmoving(
    root: Path, folder: str, rng: random.Random, train_rows: int = 60, test_rows: int = 8
) -> list[str]:
    """Write train and test split and their info files to `root/folder`; returns all texts. No puzzle is in both."""
    rows = random_rows(rng, train_rows + test_rows)
    for split, chosen in (("train", rows[:train_rows]), ("test", rows[train_rows:])):
        name = f"{folder}/{split}_split.parquet"
        write_parquet(root / name, chosen, SCHEMA, row_groups=4)
        write_info(root, root / folder / f"{split}_split_info.json", [name])
    pieces = [piece for row in rows for piece in row["question_interleave"] + row["solution_interleave"]]
    return [piece["content"] for piece in pieces if piece["type"] == "text"]
