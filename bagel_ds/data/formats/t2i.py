"""Text to image: one picture, one of its captions.

Row: `image` (bytes, or struct<bytes, path>) and `captions` (a JSON object or list as text, or such an Arrow value) or
`caption` (text). Sample: one of the captions (condition), picture (velocity loss).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.source import MSE, ParsedRow, Piece, Record, Source, image_bytes, needed_columns, text_of
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VAE, BadRow
from bagel_ds.errors import shown


class TextToImage(Source):
    name = "t2i"
    kinds = ("t2i_pretrain", "code_derived_captions", "repurposing_competition")
    version = 1
    losses = frozenset({MSE})
    vae_transform = ImageTransform(16, 1024, 512)
    vit_transform = None
    conditions_drop = True

    def columns(self, available: Sequence[str]) -> list[str]:
        captions = [name for name in ("captions", "caption") if name in available]
        return needed_columns(available, "image", *(captions or ["captions"]))

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        return ParsedRow((), _captions(row), [image_bytes(row.get("image"), "image")])

    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        return [Piece(TEXT, draws.choice(len(record.text_lengths))), Piece(VAE, 0, loss=True)]


def _captions(row: dict[str, Any]) -> list[str]:
    value = row.get("captions")
    if value is None:
        if row.get("caption") is None:
            raise BadRow("the row has no caption: captions and caption are null")
        return [text_of(row["caption"], "caption")]
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"captions is not valid JSON ({error}); plain text goes into a column `caption`") from error
        value = [value] if isinstance(value, str) else value
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        raise BadRow(f"captions holds {shown(value)}, expected a list or an object of captions")
    # An Arrow map is a list of (key, value).
    texts = [text for item in value if isinstance(text := item[-1] if isinstance(item, tuple) else item, str)]
    if value and not texts:
        raise BadRow("none of the captions is text")
    return texts or [" "]  # as the original: a picture with an empty list of captions is trained on a blank
