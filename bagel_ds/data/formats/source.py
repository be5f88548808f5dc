"""What a data format is to the rest: parse a row, count it, arrange it.

Guarantees: a format is one small class that knows its columns and the order of a sample's pieces; sizes, token counts,
dropout, modality switches and reading are common code elsewhere. `parse` enumerates texts and images of a row in one
fixed order, and all later steps (index, plan, materialise) name them by their place in that order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Sequence

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.record import ParsedRow, Record
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.data.samples.video import FrameSampler

__all__ = ["CE", "MSE", "ParsedRow", "Piece", "Record", "Source", "image_bytes", "list_of", "needed_columns"]

CE, MSE = "ce", "mse"


class Piece(NamedTuple):
    """One piece of a sample, in sequence order; becomes a `data.sample.Entry`."""

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
        """Those of a parquet file's columns that are needed. Raises `BadRow` naming missing ones."""

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
    """Encoded bytes of an image cell: binary, or struct<bytes, path>."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        raise BadRow(f"{name} holds no image bytes")
    if not isinstance(value, bytes):
        raise BadRow(f"{name} is {type(value).__name__}, expected the bytes of an image file")
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """The cell `name` as a list. Raises `BadRow`."""
    if not isinstance(value, list):
        raise BadRow(f"{name} is {type(value).__name__}, expected a list")
    return value
