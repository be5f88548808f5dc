"""Interleaved reasoning: a question and a solution, both of texts and pictures (MathCanvas-Instruct, BlockMoving).

Row: `question_interleave` and `solution_interleave` (list<struct<type, content, index>>), `question_images` and
`solution_images` (list<binary> or list<struct<bytes, path>>), `answer` (string, only required not to be empty).
Sample: the question as condition, then solution texts (cross-entropy, also at their end: what comes next) and solution
pictures (velocity loss, then clean VAE and ViT copies for what follows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.source import CE, MSE, ParsedRow, Piece, Record, Source, image_bytes, list_of, needed_columns
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, BadRow

_QUESTION_TEXT, _QUESTION_IMAGE, _SOLUTION_IMAGE = 0, 1, 2  # items of the structure; solution texts: below
# Solution texts, by what their end marker predicts: a picture, the end of the solution, another text.
_THEN_IMAGE, _THEN_END, _THEN_TEXT = 3, 4, 5
_SPECIAL = {_THEN_IMAGE: "start_of_image", _THEN_END: "end_of_text", _THEN_TEXT: "bos"}


class Interleave(Source):
    name = "interleave"
    kinds = ("interleave_reasoning",)
    version = 1
    losses = frozenset({CE, MSE})
    conditions_drop = True

    def columns(self, available: Sequence[str]) -> list[str]:
        answer = ["answer"] if "answer" in available else []
        needed = ("question_interleave", "solution_interleave", "question_images", "solution_images")
        return needed_columns(available, *needed, *answer)

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        answer = row.get("answer", "-")
        if answer is None or answer == "":
            raise BadRow("answer is empty")
        parsed = ParsedRow((), [], [])
        structure = _add_items(row, "question", parsed) + _add_items(row, "solution", parsed)
        return parsed._replace(structure=tuple(structure))

    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        pieces = []
        text = image = 0
        for item in record.structure:
            if item in (_QUESTION_IMAGE, _SOLUTION_IMAGE):
                noised = [Piece(VAE, image, loss=True)] if item == _SOLUTION_IMAGE else []
                pieces += [*noised, Piece(VAE, image), Piece(VIT, image)]
                image += 1
            else:
                pieces.append(Piece(TEXT, text, loss=item != _QUESTION_TEXT, special=_SPECIAL.get(item, "")))
                text += 1
        return pieces


def _add_items(row: dict[str, Any], part: str, parsed: ParsedRow) -> list[int]:
    """Append the texts and images of one part to `parsed`, return its structure."""
    items = list_of(row.get(f"{part}_interleave"), f"{part}_interleave")
    images = row.get(f"{part}_images") or []
    if not items:
        raise BadRow(f"{part}_interleave is empty")
    structure = []
    for i, item in enumerate(items):
        place = f"{part}_interleave[{i}]"
        if _type(item) == "image":
            index = _index(item, place, len(images))
            parsed.images.append(image_bytes(images[index], f"{part}_images[{index}]"))
            structure.append(_QUESTION_IMAGE if part == "question" else _SOLUTION_IMAGE)
        elif _type(item) == "text":
            text = (item.get("content") or "").strip()
            if text:
                parsed.texts.append(text)
                structure.append(_QUESTION_TEXT if part == "question" else _what_follows(items, i))
        else:
            raise BadRow(f"{place} has type {_type(item)!r}, expected 'text' or 'image'")
    return structure


def _what_follows(items: list[Any], i: int) -> int:
    # Looks at the list as it stands, blank items included: so does the original.
    if i + 1 == len(items):
        return _THEN_END
    return _THEN_IMAGE if _type(items[i + 1]) == "image" else _THEN_TEXT


def _type(item: Any) -> Any:
    return item.get("type") if isinstance(item, dict) else None


def _index(item: dict[str, Any], place: str, images: int) -> int:
    value = item.get("index")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise BadRow(f"{place} is an image without an index")
    if not isinstance(value, (int, float)) or not 0 <= int(value) < images:
        raise BadRow(f"{place} names image {value}, the row has {images}")
    return int(value)
