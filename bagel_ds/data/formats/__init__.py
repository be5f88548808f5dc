"""The data formats, one file each: how a row becomes numbered texts and images, and how a sample is arranged of them.

Promises: whatever a row holds, parsing gives a `ParsedRow` or a reason in words, and never opens a file outside the
folders of the dataset; a format knows only its columns, the order of pieces and the default sizes of its images. May
import `data/samples`, `data/files`, the tokenizer and what lies below them. Begin with `source.py`, then `t2i.py`, the
shortest format; a new format is one new file and its class in `registry.py`.
"""

from bagel_ds.data.formats.registry import KINDS, SOURCES
from bagel_ds.data.formats.source import ParsedRow, Piece, Record, Source

__all__ = ["KINDS", "SOURCES", "ParsedRow", "Piece", "Record", "Source"]
