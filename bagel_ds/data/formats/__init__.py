"""Data formats, one file each."""

from bagel_ds.data.formats.registry import KINDS, SOURCES
from bagel_ds.data.formats.source import ParsedRow, Piece, Record, Source

__all__ = ["KINDS", "SOURCES", "ParsedRow", "Piece", "Record", "Source"]
