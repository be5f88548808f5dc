"""The picture of the README: what `make demo-long` measured and answered.

`python bench/readme_picture.py demo-long docs/images/demo.png` reads the run's metrics.jsonl, before.json and
after.json, and lets its newest checkpoint answer the first test rows. Guarantees: curve, shares and answers are the
run's; every row is shown whether its answer is right or wrong.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bagel_ds.demo.gallery import answers
from bagel_ds.demo.learned import exact_answers, examples
from bagel_ds.demo.summary import last_checkpoint
from bagel_ds.inference.loading import open_inferencer

SIZE, SCALE = (1000, 400), 2  # drawn larger, then reduced: smooth lines
INK, FAINT, LINE, RIGHT, WRONG = "#222222", "#d8d8d8", "#3566b8", "#2a7d3f", "#b3372f"
PLOT = (64, 56, 470, 340)  # left, top, right, bottom
CELL, GAP, FIRST = 96, 24, (520, 84)  # a board, the space between two, the first one's corner
COLUMNS = 4


class Page:
    """A page in units of the final pixels."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
        self._pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int = 15, fill: str = INK, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self._pen.text((x * SCALE, y * SCALE), words, fill=fill, font=font, anchor=anchor)

    def line(self, points: list[tuple[float, float]], fill: str, width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._pen.line(scaled, fill=fill, width=round(width * SCALE), joint="curve")

    def paste(self, picture: Image.Image, x: int, y: int) -> None:
        larger = picture.resize((CELL * SCALE, CELL * SCALE), Image.Resampling.NEAREST)
        self.image.paste(larger, (x * SCALE, y * SCALE))

    def frame(self, x: int, y: int, fill: str) -> None:
        corners = [(x - 2) * SCALE, (y - 2) * SCALE, (x + CELL + 2) * SCALE, (y + CELL + 2) * SCALE]
        self._pen.rectangle(corners, outline=fill, width=2 * SCALE)


def curve(page: Page, metrics: Path) -> None:
    """The text loss over the steps."""
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, losses = [line["step"] for line in found], [line["loss/ce"] for line in found]
    left, top, right, bottom = PLOT
    last, highest = max(steps), max(losses)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * loss / highest

    for value in range(0, int(highest) + 1, 2):
        page.line([place(0, value), place(last, value)], FAINT)
        page.text(left - 10, place(0, value)[1], str(value), anchor="rm")
    for step in range(0, last + 2, 200):
        page.text(place(step, 0)[0], bottom + 8, str(step), anchor="ma")
    page.line([place(step, loss) for step, loss in zip(steps, losses)], LINE, 2)
    page.text(left, 20, "text loss (cross-entropy)", 17)
    page.text((left + right) / 2, bottom + 32, "step", anchor="ma")


def boards(page: Page, demo: Path, results: Path) -> None:
    """The first test rows with the model's answers, and the shares of exact answers over all of them."""
    before, after = (exact_answers(results / f"{name}.json") for name in ("before", "after"))
    page.text(FIRST[0], 20, f"exact answers on new boards: {before:.0%} before, {after:.0%} after", 17)
    page.text(FIRST[0], 46, "Which way must the red block go to reach the black one?")
    checkpoint = last_checkpoint(results / "checkpoints")
    assert checkpoint is not None, f"{results / 'checkpoints'} holds no checkpoint"
    found = examples(demo)
    for number, (example, result) in enumerate(zip(found, answers(open_inferencer(checkpoint), found))):
        x = FIRST[0] + number % COLUMNS * (CELL + GAP)
        y = FIRST[1] + number // COLUMNS * (CELL + 56)
        said = (result.text or "").strip()
        good = said == example.answer
        page.paste(example.picture, x, y)
        page.frame(x, y, FAINT)
        words = f"“{said}”" if good else f"“{said}”, not “{example.answer}”"
        page.text(x + CELL / 2, y + CELL + 10, words, fill=RIGHT if good else WRONG, anchor="ma")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished `make demo-long`")
    parser.add_argument("out", type=Path, help="PNG to write")
    options = parser.parse_args()
    page, results = Page(), options.demo / "results"
    curve(page, results / "metrics.jsonl")
    boards(page, options.demo, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page.image.resize(SIZE, Image.Resampling.LANCZOS).quantize(128).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
