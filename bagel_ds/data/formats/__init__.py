"""Data formats, one file each, and the streams made of them."""

from bagel_ds.data.formats.registry import KINDS, SOURCES
from bagel_ds.data.formats.source import ParsedRow, Piece, Record, Source
from bagel_ds.data.streams.opening import files_ahead, open_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions, UnusableRow

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
