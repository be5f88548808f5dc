"""What the demo's model draws and answers after training, next to the targets, in one picture.

`python -m bagel_ds.demo.gallery DEMO_DIR CHECKPOINT_DIR OUT.png`. Guarantees: prompts and targets are rows of the
demo's training data, so the picture shows how far a minute of training gets, not how well the model generalizes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from bagel_ds.demo.summary import last_checkpoint
from bagel_ds.errors import UserError
from bagel_ds.inference.generation import Inferencer, Result
from bagel_ds.inference.loading import open_inferencer
from bagel_ds.machine.output import run_command

DRAWN, ASKED = 2, 2  # examples of each
_CELL, _LINE = 128, 12  # pixels


@dataclass(frozen=True)
class Example:
    """A row of the data: the picture to draw and its caption, or a picture with a question and its answer."""

    picture: Image.Image
    prompt: str
    answer: str | None = None


def examples(data: Path) -> list[Example]:
    """The first rows of the demo's t2i and vlm data."""
    rows = pq.read_table(data / "t2i" / "00000.parquet").slice(0, DRAWN).to_pylist()
    found = [
        Example(Image.open(io.BytesIO(row["image"])).convert("RGB"), json.loads(row["captions"])["caption"])
        for row in rows
    ]
    with (data / "vlm" / "llava_ov_si.jsonl").open(encoding="utf-8") as lines:
        for _, line in zip(range(ASKED), lines):
            row = json.loads(line)
            question, answer = (turn["value"] for turn in row["conversations"][:2])
            picture = Image.open(data / "vlm" / "images" / row["image"]).convert("RGB")
            found.append(Example(picture, question.replace("<image>", "").strip(), answer))
    return found


def answers(inferencer: Inferencer, found: list[Example]) -> list[Result]:
    """The model's results for all examples, in one batch."""
    requests = []
    for seed, example in enumerate(found):
        if example.answer is None:
            size = (example.picture.height, example.picture.width)
            drawn = inferencer.request(example.prompt, mode="t2i", seed=seed, image_shapes=size, num_timesteps=25)
            requests.append(drawn)
        else:
            requests.append(inferencer.request(example.prompt, example.picture, "vqa", max_think_token_n=24))
    return inferencer.run(requests)


def sheet(found: list[Example], results: list[Result]) -> Image.Image:
    """One row per example: the target, what the model drew, and the texts."""
    page = Image.new("RGB", (2 * _CELL + 420, len(found) * (_CELL + 8) + 8), "white")
    pen = ImageDraw.Draw(page)
    for number, (example, result) in enumerate(zip(found, results)):
        top = 8 + number * (_CELL + 8)
        for column, picture in enumerate([example.picture, result.image]):
            if picture is not None:
                page.paste(_fitted(picture), (8 + column * _CELL, top))
        if example.answer is None:
            words = ["prompt:", example.prompt, "", "left: the target, right: drawn"]
        else:
            words = ["question:", example.prompt, "expected:", example.answer, "answered:", result.text or ""]
        for line, text in enumerate(each for word in words for each in _wrapped(word)):
            pen.text((2 * _CELL + 24, top + line * _LINE), text, fill="black")
    return page


def _fitted(picture: Image.Image) -> Image.Image:
    scale = (_CELL - 8) / max(picture.size)
    return picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.NEAREST)


def _wrapped(text: str, width: int = 62) -> list[str]:
    """Lines of printable ASCII, because the default font has no other letters."""
    text = text.encode("ascii", "replace").decode().replace("\n", " ")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return [text[start : start + width] for start in range(0, len(text), width)] or [""]


def main(arguments: list[str] | None = None) -> int:
    """Write the picture of a demo's checkpoint. Returns 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m bagel_ds.demo.gallery", description=main.__doc__)
    parser.add_argument("demo", type=Path, help="folder that `bagel-ds demo` wrote")
    parser.add_argument("checkpoint", type=Path, help="checkpoint_dir (its newest step_N is used) or a model folder")
    parser.add_argument("out", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        found = examples(options.demo / "data" / "bagel_example")
        results = answers(open_inferencer(last_checkpoint(options.checkpoint) or options.checkpoint), found)
        sheet(found, results).save(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"  Drawn and answered {options.out}: the trained model's results for four rows, next to the targets")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
