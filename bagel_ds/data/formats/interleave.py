"""Interleaved reasoning: a question and a solution, both of texts and pictures (MathCanvas-Instruct, BlockMoving).

Row: `question_interleave` and `solution_interleave` (list<struct<type, content, index>>), `question_images` and
`solution_images` (list<binary> or list<struct<bytes, path>>), `answer` (a row without one is not used). Sample: the
question as condition, then solution texts (cross-entropy, also for what comes after each) and solution pictures
(velocity loss, then clean VAE and ViT copies for what follows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.record import UNUSED_IMAGE, Note
from bagel_ds.data.formats.source import (
    CE,
    MSE,
    ParsedRow,
    Piece,
    Record,
    Source,
    image_bytes,
    list_of,
    needed_columns,
    text_of,
)
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, BadRow
from bagel_ds.errors import shown

_QUESTION_TEXT, _QUESTION_IMAGE, _SOLUTION_IMAGE = 0, 1, 2  # items of the structure, and:
# solution texts, by what their end marker predicts: a picture, the end of the solution, another text.
_THEN_IMAGE, _THEN_END, _THEN_TEXT = 3, 4, 5
_SPECIAL = {_THEN_IMAGE: "start_of_image", _THEN_END: "end_of_text", _THEN_TEXT: "bos"}


class Interleave(Source):
    name = "interleave"
    kinds = ("interleave_reasoning",)
    version = 1
    losses = frozenset({CE, MSE})
    vae_transform = ImageTransform(16, 512, 512)
    vit_transform = ImageTransform(14, 512, 512)
    conditions_drop = True

    def columns(self, available: Sequence[str]) -> list[str]:
        answer = ["answer"] if "answer" in available else []
        needed = ("question_interleave", "solution_interleave", "question_images", "solution_images")
        return needed_columns(available, *needed, *answer)

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        answer = row.get("answer", "-")
        if answer is None or answer == "":
            raise BadRow("answer is empty")
        texts: list[str] = []
        images: list[Any] = []
        notes: list[Note] = []
        structure = [item for part in ("question", "solution") for item in _add_items(row, part, texts, images, notes)]
        return ParsedRow(tuple(structure), texts, images, tuple(notes))

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


def _add_items(row: dict[str, Any], part: str, texts: list[str], pictures: list[Any], notes: list[Note]) -> list[int]:
    """Append the texts, pictures and notes of "question" or "solution"; return its structure."""
    items = list_of(row.get(f"{part}_interleave"), f"{part}_interleave")
    cells = row.get(f"{part}_images")
    images = [] if cells is None else list_of(cells, f"{part}_images")
    if not items:
        raise BadRow(f"{part}_interleave is empty")
    structure, shown_images = [], set()
    for i, item in enumerate(items):
        place = f"{part}_interleave[{i}]"
        if _type(item) == "image":
            index = _index(item, place, f"{part}_images", len(images))
            shown_images.add(index)
            pictures.append(image_bytes(images[index], f"{part}_images[{index}]"))
            structure.append(_QUESTION_IMAGE if part == "question" else _SOLUTION_IMAGE)
        elif _type(item) == "text":
            content = item.get("content")
            text = "" if content is None else text_of(content, f"the content of {place}").strip()
            if text:
                texts.append(text)
                structure.append(_QUESTION_TEXT if part == "question" else _what_follows(items, i))
        else:
            raise BadRow(f"{place} has type {shown(_type(item))}, expected 'text' or 'image'")
    unused = [index for index in range(len(images)) if index not in shown_images]
    notes += [Note(UNUSED_IMAGE, f"no item shows {part}_images[{index}]") for index in unused]
    return structure


def _what_follows(items: list[Any], i: int) -> int:
    # As in the original, a blank item counts here although it is left out.
    if i + 1 == len(items):
        return _THEN_END
    return _THEN_IMAGE if _type(items[i + 1]) == "image" else _THEN_TEXT


def _type(item: Any) -> Any:
    return item.get("type") if isinstance(item, dict) else None


def _index(item: dict[str, Any], place: str, column: str, images: int) -> int:
    """Which image an item shows. pandas writes whole numbers as floats where a column also has nulls."""
    value = item.get("index")
    if value is None or value != value:  # NaN
        raise BadRow(f"{place} is an image without an index")
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        raise BadRow(f"{place} has index {shown(value)}, expected a whole number")
    if not 0 <= value < images:
        raise BadRow(f"{place} has index {shown(value)}, but {column} has {images} images, numbered from 0")
    return int(value)
