"""The commands that a page of the documentation shows."""

from __future__ import annotations

import re
from pathlib import Path


def code_blocks(page: Path, language: str = r"\w*") -> list[list[str]]:
    """The lines of each fenced block of code, with lines that a backslash continues joined."""
    fenced = rf"^ *```{language}\n(.*?)^ *```"
    blocks = re.findall(fenced, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ").splitlines() for block in blocks]
