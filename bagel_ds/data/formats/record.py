"""A row as read, and what the index remembers of it.

Guarantees: texts and images of a row are numbered in the one order in which its source's `parse` lists them; index,
plan and materialise name them by these numbers. A record is a short list of int32 values, so that ten million of them
fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bagel_ds.data.files.filesystems import Unreadable
from bagel_ds.data.samples.images import image_size
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.data.samples.video import Video
from bagel_ds.model_folder.tokenizer import Tokenizer

VERSION = 1  # of the values written by `encode_record`


class ParsedRow(NamedTuple):
    """A row as read, nothing decoded. `structure` is what its source needs besides lengths and sizes."""

    structure: tuple[int, ...]
    texts: list[str]
    images: list[bytes | Path | Video]


class Record(NamedTuple):
    """The index's memory of a row."""

    structure: Sequence[int]
    text_lengths: Sequence[int]  # token ids of every text
    image_sizes: Sequence[tuple[int, int]]  # (width, height) of every image or video, before any resize


def encode_record(parsed: ParsedRow, tokenizer: Tokenizer) -> list[int]:
    """[items of structure, images, structure..., (width, height)..., text lengths...]. Raises `BadRow`."""
    sizes = [side for image in parsed.images for side in _size(image)]
    try:
        lengths = [len(ids) for ids in tokenizer.encode_batch(parsed.texts)]
    except TypeError as error:  # how the tokenizer refuses a string that has no UTF-8 form
        raise BadRow("a text is not valid Unicode (it holds half of a surrogate pair)") from error
    return [len(parsed.structure), len(parsed.images), *parsed.structure, *sizes, *lengths]


def _size(image: bytes | Path | Video) -> tuple[int, int]:
    return (image.width, image.height) if isinstance(image, Video) else image_size(image)


def decode_record(numbers: Sequence[int]) -> Record:
    """Inverse of `encode_record`."""
    structure, images = numbers[0], numbers[1]
    sizes = 2 + structure
    texts = sizes + 2 * images
    pairs = list(zip(numbers[sizes:texts:2], numbers[sizes + 1 : texts : 2], strict=True))
    return Record(numbers[2:sizes], numbers[texts:], pairs)


def reason_of(error: Exception) -> str:
    """Why a row failed, in one line."""
    text = str(error) if isinstance(error, (BadRow, Unreadable)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
