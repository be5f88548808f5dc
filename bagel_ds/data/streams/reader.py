"""Reading planned rows without an index, in the processes that make batches.

Guarantees: an address, made from the index, is all that reading its row takes, so workers get no copy of the index.
Reading gives the row or the reason why it cannot be read, never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bagel_ds.data.files import rows
from bagel_ds.data.files.filesystems import shown
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.record import ParsedRow, reason_of
from bagel_ds.data.formats.source import Piece, Source
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import BadRow, Entry


class RowPlace(NamedTuple):
    """Where a row lies: `row` counts within row group `row_group`, or is a line number where `row_group` is -1.

    `row` is -1 for the file as a whole.
    """

    dataset: str
    file: str
    row_group: int
    row: int

    def __str__(self) -> str:
        """ "<dataset>: <file> row group g row r", for messages."""
        place = f"line {self.row}" if self.row_group < 0 else f"row group {self.row_group} row {self.row}"
        return f"{self.dataset}: {shown(self.file)} {'as a whole' if self.row < 0 else place}"


class UnusableRow(NamedTuple):
    """A row that no sample can be made of, or a whole file."""

    place: RowPlace
    reason: str


class RowAddress(NamedTuple):
    """How to read the row at `place`."""

    place: RowPlace
    folder: ImageFolder  # of the pictures that lines name
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
        """Announce that this process will read the row after those announced before, which saves repeated reads."""
        _, file, row_group, row = address.place
        if row_group >= 0:
            rows.expect_parquet_row(file, row_group, row, address.columns)

    def sharing(self, images: int, pieces: Sequence[Piece | Entry]) -> int:
        """How many pictures share `max_pixels`: a row's images, shown or not, or the frames that a sample shows."""
        if not self.source.images_share_pixels:
            return 1
        return max(images, sum(piece.frame >= 0 for piece in pieces))
