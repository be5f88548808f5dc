"""Conversations -> lines of the format for conversations, with their pictures.

Input: `conversations` of from / value (LLaVA), or `messages` of role / content, where content is a text with <image>
tags or a list of parts. A tag, or a part without a picture of its own, shows the next of the row's `image` or `images`.
A system turn becomes a human turn of its own: context without a loss, as in the original's inference. Guarantees: every
picture is shown exactly once; a row whose tags and pictures differ is bad, so that no picture is lost unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.convert.columns import Given, checked_text, find_column
from bagel_ds.convert.pictures import picture
from bagel_ds.convert.tables import Table
from bagel_ds.data.formats.source import list_of, text_of
from bagel_ds.data.formats.vlm import IMAGE_TAG
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.errors import shown

TURNS = ("conversations", "messages", "conversation")
_ROLES = {"human": "human", "user": "human", "system": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt"}


class Line(NamedTuple):
    """A line without its pictures, and the bytes of these in the order of their tags."""

    line: dict[str, Any]
    pictures: list[bytes]


class Chats:
    """Converts rows of a table."""

    source = "vlm"

    def __init__(self, table: Table, given: Given) -> None:
        self.turns = find_column(table.columns, given.text, "--text_column", TURNS, "conversations")
        self.images: list[str] = [name for name in ("image", "images") if name in table.columns]  # a text needs none
        if given.image is not None:
            self.images = [find_column(table.columns, given.image, "--image_column", (), "pictures")]
        self.folder: Path = given.folder
        self.columns = [self.turns, *self.images, "id", "video", "videos"]

    def convert(self, values: dict[str, Any]) -> Line:
        """The line of the format. Raises `BadRow`."""
        if values.get("video") or values.get("videos"):
            raise BadRow("the row has a video; only pictures are converted (write such lines as docs/data.md shows)")
        if values.get(self.turns) is None:
            raise BadRow(f"the row has no {self.turns}")
        images = _Shown([image for name in self.images for image in _listed(values.get(name))])
        turns = []
        for number, turn in enumerate(list_of(values[self.turns], self.turns)):
            role, content = _turn(turn, number)
            text = _gpt_text(content, number) if role == "gpt" else _human_text(content, number, images)
            if text.strip() or role == "gpt":
                checked_text(text, f"turn {number}")
                turns.append({"from": role, "value": text})
        if left := len(images.row) - images.taken:
            raise BadRow(
                f"the row has {len(images.row)} pictures, its human turns show {images.taken}: {left} more "
                f"{IMAGE_TAG} are needed"
            )
        if not any(turn["from"] == "gpt" for turn in turns):
            raise BadRow("no turn of gpt or assistant, so there is nothing to learn")
        pictures = [picture(value, "a picture of the row", self.folder) for value in images.shown]
        line: dict[str, Any] = {"conversations": turns}
        if values.get("id") is not None:
            line = {"id": str(values["id"]), **line}
        return Line(line, pictures)


class _Shown:
    """The pictures of a row, taken one after the other, and all pictures in the order in which turns show them."""

    def __init__(self, row: list[Any]) -> None:
        self.row, self.taken = row, 0
        self.shown: list[Any] = []

    def next(self) -> None:
        if self.taken == len(self.row):
            raise BadRow(f"the turns show more pictures than the row has ({len(self.row)})")
        self.shown.append(self.row[self.taken])
        self.taken += 1


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "") or value != value else [value]  # NaN: null


def _turn(turn: Any, number: int) -> tuple[str, Any]:
    """(human or gpt, content)."""
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {shown(turn)}, expected an object with from and value, or role and content")
    role = turn.get("from") if turn.get("from") is not None else turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"turn {number} has the role {shown(role)}, expected one of {', '.join(_ROLES)}")
    return _ROLES[role], turn.get("value") if turn.get("value") is not None else turn.get("content")


def _gpt_text(content: Any, number: int) -> str:
    if not isinstance(content, list):
        return text_of(content, f"turn {number}")
    parts = list(_parts(content, number))
    if any(kind == "image" for kind, _ in parts):
        raise BadRow(f"turn {number} of the assistant shows a picture; only human turns may")
    return "\n".join(text for _, text in parts)


def _human_text(content: Any, number: int, images: _Shown) -> str:
    """The turn's text with one tag per picture."""
    parts = list(_parts(content, number)) if isinstance(content, list) else [("text", content)]
    texts = []
    for kind, value in parts:
        if kind == "text":
            text = text_of(value, f"turn {number}")
            for _ in range(text.count(IMAGE_TAG)):
                images.next()
            texts.append(text)
            continue
        if value is None:
            images.next()
        else:
            images.shown.append(value)
        texts.append(IMAGE_TAG)
    return "\n".join(texts)


def _parts(content: list[Any], number: int) -> Iterator[tuple[str, Any]]:
    """("text", text), or ("image", the picture or None)."""
    for place, part in enumerate(content):
        where = f"part {place} of turn {number}"
        if isinstance(part, str):
            yield "text", part
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            yield "text", text_of(part.get("text"), where)
        elif kind in ("image", "image_url"):
            keys = ("image", "image_url", "path", "url")
            value = next((part[key] for key in keys if part.get(key) is not None), None)
            yield "image", value["url"] if isinstance(value, dict) and value.get("url") else value
        else:
            raise BadRow(f"{where} is {shown(kind if isinstance(part, dict) else part)}, expected text or image")
