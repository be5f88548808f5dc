"""Writes the planner's current table into docs/low_memory.md and docs/zh: `python bench/low_memory_page.py`."""

from __future__ import annotations

from pathlib import Path

from bagel_ds.memory.table import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = (DOCS / "low_memory.md", DOCS / "zh" / "low_memory.md")
BEGIN, END = "<!-- bagel-ds memory --table -->", "<!-- end of the table -->"


def main() -> None:
    planned = table()
    for page in PAGES:
        before, rest = page.read_text().split(BEGIN)
        _, after = rest.split(END)
        page.write_text(f"{before}{BEGIN}\n{planned}\n{END}{after}")


if __name__ == "__main__":
    main()
