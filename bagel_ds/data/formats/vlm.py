"""Vision-language conversations: a jsonl file and a folder of pictures or videos.

Line: `conversations` ([{from: human | gpt, value}]) and optionally `image` (a path below the folder, or a list of
them), shown where the human turns say `<image>`, or else `video` (one path), shown where they say `<video>`, as several
of its frames. Sample: turns in order; gpt turns carry the cross-entropy loss. Nothing is ever dropped. A file outside
the folder is never opened, except where links may lead (`data/files/image_folder.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder, RefusedPath
from bagel_ds.data.formats.source import CE, ParsedRow, Piece, Record, Source, list_of
from bagel_ds.data.samples import video
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.sample import TEXT, VIT, BadRow

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
_TAGS = re.compile(f"({IMAGE_TAG}|{VIDEO_TAG})")
# Items of the structure; that of a video is followed by its frames and the least and most that are shown of them.
_TEXT, _LOSS_TEXT, _IMAGE, _VIDEO = 0, 1, 2, 3


@dataclass(frozen=True)
class VisionLanguage(Source):
    frames: video.FrameSampler = video.FrameSampler()

    name = "vlm"
    kinds = ("vlm_sft",)
    version = 2
    losses = frozenset({CE})
    conditions_drop = False
    jsonl = True
    images_share_pixels = True

    def with_frames(self, frames: video.FrameSampler) -> VisionLanguage:
        return VisionLanguage(frames)

    @property
    def settings(self) -> str:
        # Without PyAV the index holds every video as a bad row, so installing it must make another index.
        return f"{self.frames.min_num_frames}-{self.frames.max_num_frames} video:{video.available()}"

    def columns(self, available: Sequence[str]) -> list[str]:
        raise BadRow("conversations are read from a .jsonl file, not from parquet")

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        images = [_inside(value, folder, "image") for value in _names(row.get("image"))]
        clips = _names(row.get("video")) if row.get("image") is None else []
        items: list[int] = []
        texts: list[str] = []
        for turn in list_of(row.get("conversations"), "conversations"):
            if isinstance(turn, dict) and turn.get("from") in ("human", "gpt"):
                _add_turn(turn, items, texts)
        _check_tags(items, len(images), len(clips))
        if _LOSS_TEXT not in items:
            raise BadRow("no gpt turn with text, so nothing to learn")
        if not clips:
            return ParsedRow(tuple(items), texts, list[Any](images))
        clip = video.read_header(_inside(clips[0], folder, "video"))
        place = items.index(_VIDEO) + 1
        items[place:place] = [clip.frames, self.frames.min_num_frames, self.frames.max_num_frames]
        return ParsedRow(tuple(items), texts, [clip])

    def files(self, row: dict[str, Any], folder: ImageFolder) -> list[str]:
        names = _names(row.get("image")) or _names(row.get("video"))
        inside = [name for name in names if isinstance(name, str) and name and ".." not in PurePosixPath(name).parts]
        return [os.path.join(folder.path, name) for name in inside if not name.startswith("/")]

    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        pieces = []
        text = image = 0
        items = iter(record.structure)
        for item in items:
            if item == _VIDEO:
                shown = video.sample_frames(next(items), next(items), next(items), draws)
                pieces += [Piece(VIT, 0, frame=frame) for frame in shown]
            elif item == _IMAGE:
                pieces.append(Piece(VIT, image))
                image += 1
            else:
                if record.text_lengths[text]:  # a text without a token is no piece
                    pieces.append(Piece(TEXT, text, loss=item == _LOSS_TEXT))
                text += 1
        return pieces


def _add_turn(turn: dict[str, Any], items: list[int], texts: list[str]) -> None:
    value = turn.get("value")
    if not isinstance(value, str):
        raise BadRow(f"the value of a {turn['from']} turn is {type(value).__name__}, expected text")
    parts = _TAGS.split(value) if turn["from"] == "human" else [value]
    if len(parts) == 1:
        if value:
            items.append(_LOSS_TEXT if turn["from"] == "gpt" else _TEXT)
            texts.append(value)
        return
    for part in parts:
        if part in (IMAGE_TAG, VIDEO_TAG):
            items.append(_IMAGE if part == IMAGE_TAG else _VIDEO)
        elif part.strip():
            items.append(_TEXT)
            texts.append(part.strip())


def _check_tags(items: list[int], images: int, videos: int) -> None:
    """An image that no turn shows is left out, as in the original; a tag without its file is a bad row."""
    if items.count(_IMAGE) > images:
        raise BadRow(f"the turns show {IMAGE_TAG} {items.count(_IMAGE)} times, the row has {images} images")
    if videos > 1:
        raise BadRow(f"the row has {videos} videos; one is supported")
    if items.count(_VIDEO) != videos:
        raise BadRow(f"the turns show {VIDEO_TAG} {items.count(_VIDEO)} times, the row has {videos} videos to show")


def _names(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _inside(value: Any, folder: ImageFolder, what: str) -> Path:
    if not isinstance(value, str) or not value:
        raise BadRow(f"{what} is {value!r}, expected a path below the image folder")
    try:
        return folder.file(value)
    except RefusedPath as refusal:
        raise BadRow(f"the {what} path {value[:100]!r} {refusal}") from refusal
