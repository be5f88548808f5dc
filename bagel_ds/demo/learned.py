"""Whether the demo's network learned the one-move puzzles: `python -m bagel_ds.demo.learned DEMO_DIR RESULTS_DIR`.

Reads RESULTS_DIR/before.json and after.json, which `bagel-ds evaluate --json --metric` printed, and the newest
checkpoint. Guarantees: exit code 0 only if the share of exact answers on the test rows rose as far as LEARNED and RISE
say. Every picture in answers.png is a test row, and it stands there whether its answer is right or wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from bagel_ds.demo.gallery import Example, answers, sheet
from bagel_ds.demo.one_move import FOLDER, QUESTION
from bagel_ds.demo.summary import last_checkpoint
from bagel_ds.errors import UserError
from bagel_ds.inference.loading import open_inferencer
from bagel_ds.machine.output import run_command

LEARNED, RISE = 0.8, 0.4  # exact answers after training at least, and more than before at least; guessing gives 0.25
SHOWN = 8  # test rows in the picture, two of each direction
SCORE = "val/exact_answer"


def exact_answers(path: Path) -> float:
    """The share of exact answers in what `bagel-ds evaluate --json` printed. Raises UserError."""
    try:
        (result,) = json.loads(path.read_text())["results"]
        return float(result["scores"][SCORE])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the output of bagel-ds evaluate --json --metric exact_answer.py:exact_answer for one "
            f"weight file ({type(error).__name__}: {error}); run launch/demo_long.sh"
        ) from None


def verdict(before: float, after: float) -> tuple[bool, str]:
    """Whether the task was learned, and a line about it."""
    learned = after >= LEARNED and after - before >= RISE
    line = f"exact answers on test boards never trained on: {before:.1%} untrained, {after:.1%} trained"
    if not learned:
        line += f"; expected at least {LEARNED:.0%} and {RISE:.0%} more than untrained"
    return learned, line


def examples(demo: Path) -> list[Example]:
    """The first test rows."""
    folder = demo / FOLDER
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()[:SHOWN]]
    return [
        Example(Image.open(folder / "images" / row["image"]).convert("RGB"), QUESTION, row["answer"]) for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compare the exact answers before and after training, and draw some. Returns 1 if the task was not learned."""
    parser = argparse.ArgumentParser(prog="python -m bagel_ds.demo.learned", description=main.__doc__)
    parser.add_argument("demo", type=Path, help="folder of `bagel-ds demo` with one-move puzzles")
    parser.add_argument("results", type=Path, help="folder with before.json, after.json and checkpoints/")
    options = parser.parse_args(arguments)
    try:
        learned, line = verdict(*(exact_answers(options.results / f"{name}.json") for name in ("before", "after")))
        checkpoint = last_checkpoint(options.results / "checkpoints")
        if checkpoint is None:
            raise UserError(f"{options.results / 'checkpoints'} holds no checkpoint; run launch/demo_long.sh")
        shown = examples(options.demo)
        sheet(shown, answers(open_inferencer(checkpoint, weights="model"), shown)).save(options.results / "answers.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{line}\n  Pictures, questions, targets and answers: {options.results / 'answers.png'}")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
