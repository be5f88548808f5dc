"""Edited pairs -> the rows of editing.

Input: a table with the picture before, the picture after (paths or bytes) and the instruction (a text, or a list of
alternatives). Output: `image_list` of the two and `instruction_list` of one step.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from bagel_ds.convert.columns import Given, cell, find_column, texts_of
from bagel_ds.convert.pictures import picture
from bagel_ds.convert.tables import Table
from bagel_ds.errors import UserError

SOURCE = (
    *("source", "source_image", "source_img", "input_image", "original_image", "input", "before", "src", "image"),
)
TARGET = ("target", "target_image", "target_img", "edited_image", "output_image", "output", "after", "tgt", "edited")
TEXT = ("instruction", "instructions", "edit_prompt", "edit_instruction", "edit", "prompt", "text")
SCHEMA = pa.schema([("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))])


class Edits:
    """Converts rows of a table."""

    source = "edit"

    def __init__(self, table: Table, given: Given) -> None:
        self.before = find_column(table.columns, given.source, "--source_column", SOURCE, "pictures to edit")
        self.after = find_column(table.columns, given.target, "--target_column", TARGET, "edited pictures")
        self.text = find_column(table.columns, given.text, "--text_column", TEXT, "instructions")
        self.folder = given.folder
        self.columns = [self.before, self.after, self.text]
        if len(set(self.columns)) < len(self.columns):
            raise UserError(f"source, target and instruction must be three columns, found {', '.join(self.columns)}")

    def convert(self, values: dict[str, Any]) -> dict[str, Any]:
        """The row of the format. Raises `BadRow`."""
        texts = texts_of(cell(values, self.text), self.text)
        images = [picture(cell(values, column), column, self.folder) for column in (self.before, self.after)]
        return {"image_list": images, "instruction_list": [texts]}
