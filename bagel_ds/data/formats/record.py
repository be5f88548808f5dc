"""A row as read, and what the index remembers of it.

Guarantees: a source's `parse` numbers the texts and images of a row in one fixed order; index, plan and `materialize`
name them by these numbers. A record is a short list of int32 values, so that ten million of them fit into memory.
Nothing that a row holds takes much more memory than the row itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bagel_ds.data.files.filesystems import Unreadable
from bagel_ds.data.samples.images import image_size
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.data.samples.video import Video
from bagel_ds.model_folder.tokenizer import Tokenizer

VERSION = 1  # of the values written by `encode_record`
MAX_TEXT = 1_000_000  # characters of a text: the tokenizer takes about 200 bytes for each
_MAX_NUMBER = int(np.iinfo(np.int32).max)
_LONGEST_REASON = 600  # characters, so that a path fits

# What a row may lose or change without a word: kinds of `Note`.
UNUSED_IMAGE, UNUSED_TEXT = "unused_images", "unused_texts"


class Note(NamedTuple):
    """Something of a usable row that training does not see; only `bagel-ds check` reports it."""

    kind: str
    text: str


class ParsedRow(NamedTuple):
    """A row as read, nothing decoded. `structure` is what its source needs in addition to lengths and sizes."""

    structure: tuple[int, ...]
    texts: list[str]
    images: list[bytes | Path | Video]
    notes: tuple[Note, ...] = ()


class Record(NamedTuple):
    """What the index holds of a row."""

    structure: Sequence[int]
    text_lengths: Sequence[int]  # token ids of every text
    image_sizes: Sequence[tuple[int, int]]  # (width, height) of every image or video, before any resize


def encode_record(parsed: ParsedRow, tokenizer: Tokenizer) -> list[int]:
    """[items of structure, images, structure..., (width, height)..., text lengths...], each int32. Raises `BadRow`."""
    sizes = [side for image in parsed.images for side in _size(image)]
    try:
        lengths = [len(ids) for texts in _batches(parsed.texts) for ids in tokenizer.encode_batch(texts)]
    except TypeError as error:  # how the tokenizer refuses a string that has no UTF-8 form
        raise BadRow("a text is not valid Unicode (it holds half of a surrogate pair)") from error
    numbers = [len(parsed.structure), len(parsed.images), *parsed.structure, *sizes, *lengths]
    if max(numbers) > _MAX_NUMBER:
        raise BadRow(f"a count or size of the row is {max(numbers)}, more than {_MAX_NUMBER}")
    return numbers


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """All texts, at most about `MAX_TEXT` characters at a time. Raises `BadRow`."""
    batch: list[str] = []
    characters = 0
    for number, text in enumerate(texts):
        if len(text) > MAX_TEXT:
            raise BadRow(f"text {number} of the row has {len(text):,} characters, more than {MAX_TEXT:,}")
        if characters + len(text) > MAX_TEXT:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    yield batch


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
    """Why a row failed, in one line of words that any stream can print."""
    if isinstance(error, (BadRow, Unreadable)):
        text = str(error)
    elif isinstance(error, RecursionError):
        text = "its values are nested too deeply"
    elif isinstance(error, MemoryError):
        text = "it needs more memory than there is"
    elif isinstance(error, OSError) or type(error).__module__.startswith("pyarrow"):
        text = f"{type(error).__name__}: {error}"
    else:
        text = f"unexpected content ({type(error).__name__}: {error})"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
