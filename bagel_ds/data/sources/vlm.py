"""Vision-language conversations: a jsonl file and a folder of pictures.

Line: `conversations` ([{from: human | gpt, value}]) and optionally `image` (a path below the folder, or a list of
them), shown where the human turns say `<image>`. Sample: turns in order; gpt turns carry the cross-entropy loss.
Nothing is ever dropped. Rows with `video` are refused for now, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bagel_ds.data.draws import Draws
from bagel_ds.data.sample import TEXT, VIT, BadRow
from bagel_ds.data.sources.source import CE, ParsedRow, Piece, Record, Source, list_of

IMAGE_TAG = "<image>"
_TEXT, _LOSS_TEXT, _IMAGE = 0, 1, 2  # items of the structure


class VisionLanguage(Source):
    name = "vlm"
    kinds = ("vlm_sft",)
    version = 1
    losses = frozenset({CE})
    conditions_drop = False
    jsonl = True
    images_share_pixels = True

    def columns(self, available: Sequence[str]) -> list[str]:
        raise BadRow("conversations are read from a .jsonl file, not from parquet")

    def parse(self, row: dict[str, Any], folder: str) -> ParsedRow:
        if row.get("video") is not None and row.get("image") is None:
            raise BadRow("the row shows a video; video rows are not supported yet")
        images = [_inside(value, folder) for value in _names(row.get("image"))]
        structure: list[int] = []
        texts: list[str] = []
        for turn in list_of(row.get("conversations"), "conversations"):
            if isinstance(turn, dict) and turn.get("from") in ("human", "gpt"):
                _add_turn(turn, structure, texts)
        if structure.count(_IMAGE) > len(images):
            raise BadRow(
                f"the turns show {IMAGE_TAG} {structure.count(_IMAGE)} times, the row has {len(images)} images"
            )
        if _LOSS_TEXT not in structure:
            raise BadRow("no gpt turn with text, so nothing to learn")
        return ParsedRow(tuple(structure), texts, list[Any](images))

    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        pieces = []
        text = image = 0
        for item in record.structure:
            if item == _IMAGE:
                pieces.append(Piece(VIT, image))
                image += 1
            else:
                if record.text_lengths[text]:  # a text without a token is no piece
                    pieces.append(Piece(TEXT, text, loss=item == _LOSS_TEXT))
                text += 1
        return pieces


def _add_turn(turn: dict[str, Any], structure: list[int], texts: list[str]) -> None:
    value = turn.get("value")
    if not isinstance(value, str):
        raise BadRow(f"the value of a {turn['from']} turn is {type(value).__name__}, expected text")
    if turn["from"] == "gpt" or IMAGE_TAG not in value:
        if value:
            structure.append(_LOSS_TEXT if turn["from"] == "gpt" else _TEXT)
            texts.append(value)
        return
    for i, part in enumerate(value.split(IMAGE_TAG)):
        if i:
            structure.append(_IMAGE)
        if part.strip():
            structure.append(_TEXT)
            texts.append(part.strip())


def _names(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _inside(value: Any, folder: str) -> Path:
    if not isinstance(value, str) or not value:
        raise BadRow(f"image is {value!r}, expected a path below the image folder")
    parts = PurePosixPath(value)
    if parts.is_absolute() or ".." in parts.parts or PureWindowsPath(value).is_absolute() or "\0" in value:
        raise BadRow(f"the image path {value!r} leaves the image folder")
    return Path(folder) / value
