"""Reading planned rows without an index: all that a process needs that makes batches.

Guarantees: an address, made from the index, holds all that reading its row takes, so no index is copied to workers.
Reading gives the row or the reason why not, never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bagel_ds.data.files import rows
from bagel_ds.data.formats.record import ParsedRow, reason_of
from bagel_ds.data.formats.source import Piece, Source
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import BadRow, Entry


class RowPlace(NamedTuple):
    """Where a row lies. `row_group` is -1 for lines; `row` counts within the row group, or is the line number."""

    dataset: str
    file: str
    row_group: int
    row: int

    def __str__(self) -> str:
        place = f"line {self.row}" if self.row_group < 0 else f"row group {self.row_group} row {self.row}"
        return f"{self.dataset}: {self.file} {place}"


class RowAddress(NamedTuple):
    """How to read the row at `place`."""

    place: RowPlace
    folder: str  # where the pictures lie that a line names
    columns: tuple[str, ...]  # of a parquet file
    offset: int  # of a line, in bytes
    length: int


@dataclass(frozen=True)
class StreamReader:
    """What reading and decoding a group's rows depends on."""

    name: str
    source: Source
    vae_transform: ImageTransform | None
    vit_transform: ImageTransform | None

    def read(self, address: RowAddress) -> ParsedRow | BadRow:
        """The row as it is in the file, texts and image bytes in the order of the index."""
        _, file, row_group, row = address.place
        try:
            if row_group < 0:
                content = rows.jsonl_row(file, address.offset, address.length)
            else:
                content = rows.parquet_row(file, row_group, row, address.columns)
            return self.source.parse(content, address.folder)
        except Exception as error:  # a file that changed or vanished during the run
            return BadRow(reason_of(error))

    def expect(self, address: RowAddress) -> None:
        """This process will read the row, after all those announced before: its row group is then read less often."""
        _, file, row_group, row = address.place
        if row_group >= 0:
            rows.expect_parquet_row(file, row_group, row, address.columns)

    def sharing(self, images: int, pieces: Sequence[Piece | Entry]) -> int:
        """How many pictures share `max_pixels`: a row's images, shown or not, or the frames that a sample shows."""
        if not self.source.images_share_pixels:
            return 1
        return max(images, sum(piece.frame >= 0 for piece in pieces))
