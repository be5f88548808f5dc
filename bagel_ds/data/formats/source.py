"""What a data format is to the rest of the package: it parses a row and arranges a sample.

Guarantees: a format is one small class that knows its columns, the order of a sample's pieces and the default sizes of
its images. Resizing, token counts, dropout, modality switches and reading are common code elsewhere. `parse` numbers
the texts and images of a row in one fixed order, and all later steps (index, plan, `materialize`) use these numbers.
Whatever a row holds, `parse` gives a `ParsedRow` or raises `BadRow`, which says what was found and what was expected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.record import ParsedRow, Record
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.data.samples.video import FrameSampler
from bagel_ds.errors import shown

__all__ = ["CE", "MSE", "ParsedRow", "Piece", "Record", "Source", "image_bytes", "list_of", "needed_columns", "text_of"]

CE, MSE = "ce", "mse"


class Piece(NamedTuple):
    """One piece of a sample, in sequence order; becomes a `samples.sample.Entry`."""

    kind: str
    content: int  # which text or image of the parsed row
    loss: bool = False
    special: str = ""  # name in SpecialTokens of the label at the text's end marker
    frame: int = -1  # of a video


class Source(ABC):
    """A data format."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]  # names in dataset configs, the original's first
    version: ClassVar[int]  # raise it when `parse` changes what is indexed
    losses: ClassVar[frozenset[str]]  # CE, MSE
    # The published sizes of images to draw and to read, used if a dataset config gives none; None: there are no such.
    vae_transform: ClassVar[ImageTransform | None]
    vit_transform: ClassVar[ImageTransform | None]
    conditions_drop: ClassVar[bool]  # texts and clean images are dropped with the *_cond_dropout_prob
    jsonl: ClassVar[bool] = False  # rows are lines of a jsonl file rather than of parquet
    images_share_pixels: ClassVar[bool] = False  # a row's images (or its video's frames) share max_pixels

    def with_frames(self, frames: FrameSampler) -> Source:
        """The same format with this many frames per video."""
        return self

    @property
    def settings(self) -> str:
        """What the index depends on besides `version`."""
        return ""

    @abstractmethod
    def columns(self, available: Sequence[str]) -> list[str]:
        """The columns of a parquet file to read. Raises `BadRow` that names missing ones."""

    @abstractmethod
    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        """`folder` holds the images of formats that name files. Raises `BadRow`."""

    def files(self, row: dict[str, Any], folder: ImageFolder) -> list[str]:
        """Paths of the files that a row names, whether they exist or not: when they change, the row is indexed again.

        Never raises; names that `parse` refuses may be left out.
        """
        return []

    @abstractmethod
    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        """The sample of a row, every choice made with `draws`."""


def needed_columns(available: Sequence[str], *needed: str) -> list[str]:
    missing = [name for name in needed if name not in available]
    if missing:
        raise BadRow(f"the columns {', '.join(missing)} are missing; the file has {', '.join(available) or 'none'}")
    return list(needed)


def image_bytes(value: Any, name: str) -> bytes:
    """Encoded bytes of an image cell: binary, or struct<bytes, path>. Raises `BadRow`."""
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and path:
            raise BadRow(
                f"{name} has the path {shown(path)} and no bytes; write the image's bytes into the column (`datasets` "
                "does so with embed_external_files)"
            )
    if value is None:
        raise BadRow(f"{name} holds no image bytes")
    if not isinstance(value, bytes):
        raise BadRow(f"{name} is {_found(value)}, expected the bytes of an image file")
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """The cell `name` as a list. Raises `BadRow`."""
    if not isinstance(value, list):
        raise BadRow(f"{name} is {_found(value)}, expected a list")
    return value


def text_of(value: Any, name: str) -> str:
    """The cell `name` as text. Raises `BadRow`."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_found(value)}, expected text")
    return value


def _found(value: Any) -> str:
    return f"{len(value):,} bytes" if isinstance(value, bytes) else shown(value)
