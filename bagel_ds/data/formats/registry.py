"""The registry: which format a dataset kind has.

A new format is one new file beside this one and its class in `SOURCES`.
"""

from __future__ import annotations

from bagel_ds.data.formats.edit import Edit
from bagel_ds.data.formats.interleave import Interleave
from bagel_ds.data.formats.source import Source
from bagel_ds.data.formats.t2i import TextToImage
from bagel_ds.data.formats.vlm import VisionLanguage

SOURCES: dict[str, Source] = {source.name: source for source in (TextToImage(), Edit(), VisionLanguage(), Interleave())}
KINDS: dict[str, Source] = {kind: source for source in SOURCES.values() for kind in source.kinds}
