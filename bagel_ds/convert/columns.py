"""Which columns of an input hold what, by their usual names, and the texts in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.data.formats.record import MAX_TEXT
from bagel_ds.data.formats.source import text_of
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.errors import UserError, nearest, shown

IMAGE = ("image", "images", "file_name", "path", "image_path", "filepath", "filename", "img", "jpg", "png")


class Given(NamedTuple):
    """What the user says about columns; None: found by name. `folder`: where relative paths of pictures begin."""

    folder: Path
    image: str | None = None
    text: str | None = None
    source: str | None = None
    target: str | None = None


def find_column(columns: Sequence[str], given: str | None, option: str, usual: Sequence[str], holds: str) -> str:
    """The column that `option` names, or the first of the usual names that there is. Raises `UserError`."""
    if given is not None:
        if given not in columns:
            raise UserError(f"{option} {given}: the input has no such column; {nearest(given, columns)}")
        return given
    by_lower = {name.lower(): name for name in reversed(columns)}
    if found := next((by_lower[name] for name in usual if name in by_lower), None):
        return found
    there = ", ".join(map(shown, columns)) or "none"
    raise UserError(f"no column with {holds} was found; pass {option} with one of the input's columns: {there}")


def cell(values: dict[str, Any], column: str) -> Any:
    """The value of a column. Raises `BadRow` where the row has none."""
    if values.get(column) is None:
        raise BadRow(f"{column} is {'empty' if column in values else 'missing'}")
    return values[column]


def texts_of(value: Any, column: str) -> list[str]:
    """A text, or all texts of a list or mapping, stripped. Raises `BadRow`."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = _decoded(value)
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    texts = [checked_text(item, column) for item in items if item is not None]
    if not texts:
        raise BadRow(f"{column} holds no text")
    return texts


def checked_text(value: Any, name: str) -> str:
    """The text without blanks around it. Raises `BadRow` where training would refuse it."""
    text = text_of(value, name).strip()
    if not text:
        raise BadRow(f"{name} holds no text")
    if len(text) > MAX_TEXT:
        raise BadRow(f"{name} has {len(text):,} characters, more than {MAX_TEXT:,}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow(f"{name} is not valid Unicode (it holds half of a surrogate pair)")
    return text


def _decoded(text: str) -> Any:
    """Captions that are JSON as text; a caption that only begins like JSON stays a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    items = list(value.values()) if isinstance(value, dict) else value
    return value if items and all(isinstance(item, str) for item in items) else text
