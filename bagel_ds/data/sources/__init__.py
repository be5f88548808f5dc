"""Data formats, one file each, and the streams made of them."""

from bagel_ds.data.sources.kinds import KINDS, SOURCES
from bagel_ds.data.sources.opening import files_ahead, open_streams
from bagel_ds.data.sources.source import ParsedRow, Piece, Record, Source
from bagel_ds.data.sources.stream import GroupStream, SampleOptions, UnusableRow

__all__ = [
    "KINDS",
    "SOURCES",
    "GroupStream",
    "ParsedRow",
    "Piece",
    "Record",
    "SampleOptions",
    "Source",
    "UnusableRow",
    "files_ahead",
    "open_streams",
]
