"""Vision-language conversations: a jsonl file and a folder of pictures or videos.

Line: `conversations` ([{from: human | gpt, value}]) and optionally `image` (a path below the folder, or a list of
them), shown where the human turns say `<image>`, or else `video` (one path), shown where they say `<video>`, as several
of its frames. Sample: turns in order; gpt turns carry the cross-entropy loss. Nothing is ever dropped. As in the
original, turns of other roles are ignored and images without a tag are not shown; notes say so. Which files may be
opened is decided in `data/files/image_folder.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder, RefusedPath
from bagel_ds.data.formats.record import UNUSED_IMAGE, UNUSED_TEXT, Note
from bagel_ds.data.formats.source import CE, ParsedRow, Piece, Record, Source, list_of, text_of
from bagel_ds.data.samples import video
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VIT, BadRow
from bagel_ds.errors import shown
from bagel_ds.regular_files import file_fault

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
_TAGS = re.compile(f"({IMAGE_TAG}|{VIDEO_TAG})")
# Items of the structure; that of a video is followed by its number of frames.
_TEXT, _LOSS_TEXT, _IMAGE, _VIDEO = 0, 1, 2, 3


@dataclass(frozen=True)
class VisionLanguage(Source):
    frames: video.FrameSampler = video.FrameSampler()

    name = "vlm"
    kinds = ("vlm_sft",)
    version = 3
    losses = frozenset({CE})
    vae_transform = None
    vit_transform = ImageTransform(14, 980, 378, 2_007_040)
    conditions_drop = False
    jsonl = True
    images_share_pixels = True

    def with_frames(self, frames: video.FrameSampler) -> VisionLanguage:
        return VisionLanguage(frames)

    @property
    def settings(self) -> str:
        # Without PyAV the index holds every video as a bad row, so installing it must make another index.
        return f"video:{video.available()}"

    def columns(self, available: Sequence[str]) -> list[str]:
        raise BadRow("conversations are read from a .jsonl file, not from parquet")

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        names, clips = _names(row)
        images = [_file(value, folder, "image") for value in names]
        items: list[int] = []
        texts: list[str] = []
        notes: list[Note] = []
        if row.get("conversations") is None:
            raise BadRow(f"the row has no conversations; its keys are {', '.join(map(shown, row)) or 'none'}")
        for number, turn in enumerate(list_of(row["conversations"], "conversations")):
            role = turn.get("from") if isinstance(turn, dict) else None
            if role in ("human", "gpt"):
                _add_turn(role, text_of(turn.get("value"), f"the value of turn {number}"), items, texts)
            else:
                found = f"has the role {shown(role)}" if isinstance(turn, dict) else f"is {shown(turn)}"
                notes.append(Note(UNUSED_TEXT, f"turn {number} {found} and is ignored; roles are human and gpt"))
        _check_tags(items, row, len(images), len(clips))
        if _LOSS_TEXT not in items:
            ignored = f" ({notes[0].text})" if notes else ""
            raise BadRow(f"no gpt turn with text, so there is nothing to learn{ignored}")
        unused = images[items.count(_IMAGE) :]
        notes += [
            Note(UNUSED_IMAGE, f"no turn shows {path}: a human turn needs a further {IMAGE_TAG}") for path in unused
        ]
        if not clips:
            return ParsedRow(tuple(items), texts, list[Any](images), tuple(notes))
        clip = video.read_header(_file(clips[0], folder, "video"))
        items.insert(items.index(_VIDEO) + 1, clip.frames)
        return ParsedRow(tuple(items), texts, [clip], tuple(notes))

    def files(self, row: dict[str, Any], folder: ImageFolder) -> list[str]:
        names, clips = _names(row)
        paths = [os.path.abspath(os.path.join(folder.path, name)) for name in names + clips if isinstance(name, str)]
        return [path for path in paths if path.startswith(os.path.join(os.path.abspath(folder.path), ""))]

    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        pieces = []
        text = image = 0
        items = iter(record.structure)
        for item in items:
            if item == _VIDEO:
                frames = video.sample_frames(next(items), self.frames, draws)
                pieces += [Piece(VIT, 0, frame=frame) for frame in frames]
            elif item == _IMAGE:
                pieces.append(Piece(VIT, image))
                image += 1
            else:
                if record.text_lengths[text]:  # a text without a token is no piece
                    pieces.append(Piece(TEXT, text, loss=item == _LOSS_TEXT))
                text += 1
        return pieces


def _add_turn(role: str, value: str, items: list[int], texts: list[str]) -> None:
    split = _TAGS.split(value) if role == "human" else [value]
    for section in split:
        if section in (IMAGE_TAG, VIDEO_TAG) and len(split) > 1:
            items.append(_IMAGE if section == IMAGE_TAG else _VIDEO)
        elif text := section.strip() if len(split) > 1 else section:
            items.append(_LOSS_TEXT if role == "gpt" else _TEXT)
            texts.append(text)


def _check_tags(items: list[int], row: dict[str, Any], images: int, videos: int) -> None:
    """A tag without its file is a bad row; an image without a tag is not, as in the original."""
    if (tags := items.count(_IMAGE)) > images:
        hint = " (it names pictures as `images`; the key is `image`)" if row.get("images") and not images else ""
        raise BadRow(f"the turns show {IMAGE_TAG} {tags} times, the row has {images} images{hint}")
    if videos > 1:
        raise BadRow(f"the row has {videos} videos; one is supported")
    if (tags := items.count(_VIDEO)) != videos:
        raise BadRow(f"the turns show {VIDEO_TAG} {tags} times, the row has {videos} videos to show")


def _names(row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What the row gives as its images and, where it has none, as its videos."""
    images, clips = (
        value if isinstance(value, list) else [] if value in (None, "") or value != value else [value]  # NaN: null
        for value in (row.get("image"), row.get("video"))
    )
    return images, [] if images else clips


def _file(value: Any, folder: ImageFolder, what: str) -> Path:
    """The regular file that the row names; the message of the `BadRow` names the path tried."""
    if not isinstance(value, str) or not value:
        raise BadRow(f"{what} is {shown(value)}, expected a path below the image folder")
    try:
        path = folder.file(value)
    except RefusedPath as refusal:
        raise BadRow(f"the {what} path {shown(value)} {refusal}") from refusal
    if fault := file_fault(path):
        raise BadRow(f"{path}: {fault}{_hint(value, folder)}")
    return path


def _hint(value: str, folder: ImageFolder) -> str:
    """What may be meant by the name of a file that cannot be opened."""
    if "://" in value:
        return f"; {shown(value)} is a URL: download the file and name its path below data_dir"
    if "\\" in value:
        return "; backslashes do not separate folders here, write /"
    names = Path(value).parts
    for first in range(1, len(names)):
        if not file_fault(Path(folder.path, *names[first:])):
            return f"; {Path(folder.path, *names[first:])} exists: the path repeats the end of data_dir"
    return ""
