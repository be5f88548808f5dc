"""CONTRIBUTING's table "where to change what" names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_every_file_of_the_table_exists() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("## Where to change what")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", row.split("|")[2]):
            places = [REPOSITORY / name, REPOSITORY / "bagel_ds" / name]
            assert any(place.exists() for place in places) or "/" not in name, f"{name} in {row}"
