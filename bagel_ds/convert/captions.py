"""Pictures with captions -> the rows of text to image.

Input: a folder of pictures with a text file beside each, or a table with a column of pictures (paths or bytes) and one
of captions (a text, a list of texts, or a JSON object of texts). Output: `image` and `captions`, a JSON object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from bagel_ds.convert.columns import IMAGE, Given, cell, find_column, texts_of
from bagel_ds.convert.pictures import picture
from bagel_ds.convert.tables import Row, Table
from bagel_ds.errors import UserError
from bagel_ds.regular_files import file_fault

TEXT = ("text", "caption", "captions", "prompt", "description")
SCHEMA = pa.schema([("image", pa.binary()), ("captions", pa.string())])
# Also what training can't read, so that it is named as a bad row.
_PICTURES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .tga .jp2 .heic .heif .jxl .psd .dng".split()
)


class CaptionFolder(Table):
    """The pictures of a folder and of all folders in it, by path; hidden files and folders are left out."""

    def __init__(self, folder: Path, extension: str) -> None:
        self.extension = extension if extension.startswith(".") else f".{extension}"
        self.pictures = sorted(_pictures(folder), key=lambda path: path.relative_to(folder).as_posix())
        texts = [text for path in self.pictures if (text := self._text(path))]
        super().__init__([*self.pictures, *dict.fromkeys(texts)], folder)
        self.files = [path for path in self.files if not file_fault(path)]
        self.count = len(self.pictures)
        self.columns = ["image", "text"]
        if not self.pictures:
            raise UserError(
                f"{folder} holds no pictures, no parquet or Arrow files and no metadata.jsonl or metadata.csv; pass a "
                "folder of pictures with texts beside them, or a table"
            )
        if not texts:
            first = self.pictures[0]
            raise UserError(
                f"none of the {len(self.pictures)} pictures in {folder} has its caption in a {self.extension} file "
                f"beside it; {first.name} would need {first.with_suffix(self.extension).name}. Another ending of the "
                "captions' files: --text_extension"
            )

    def rows(self, start: int, columns: Sequence[str]) -> Iterator[Row]:
        for path in self.pictures[start:]:
            name = path.relative_to(self.folder).as_posix()
            text = self._text(path)
            if text is None:
                yield Row(name, {}, f"no caption: {path.with_suffix(self.extension).name} does not exist")
                continue
            try:
                # Its first byte may be a brace: JSON in a caption's file is a text like any other.
                yield Row(name, {"image": path, "text": [text.read_bytes().decode("utf-8-sig")]})
            except UnicodeDecodeError as error:
                yield Row(name, {}, f"{text.name} is not UTF-8 (byte {error.start + 1})")
            except OSError as error:
                yield Row(name, {}, f"{text.name} can't be read: {error.strerror}")

    def _text(self, path: Path) -> Path | None:
        """a.txt beside a.jpg, or a.jpg.txt."""
        beside = (path.with_suffix(self.extension), path.with_name(path.name + self.extension))
        return next((text for text in beside if not file_fault(text)), None)


def _pictures(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1].lower() in _PICTURES:
                yield Path(place, name)


class Captions:
    """Converts rows of a table."""

    source = "t2i"

    def __init__(self, table: Table, given: Given) -> None:
        self.image = find_column(table.columns, given.image, "--image_column", IMAGE, "pictures")
        self.text = find_column(table.columns, given.text, "--text_column", TEXT, "captions")
        self.folder = given.folder
        self.columns = [self.image, self.text]

    def convert(self, values: dict[str, Any]) -> dict[str, Any]:
        """The row of the format. Raises `BadRow`."""
        texts = texts_of(cell(values, self.text), self.text)
        names = ["caption", *(f"caption_{number}" for number in range(2, len(texts) + 1))]
        content = picture(cell(values, self.image), self.image, self.folder)
        captions = json.dumps(dict(zip(names, texts, strict=True)), ensure_ascii=False)
        return {"image": content, "captions": captions}
