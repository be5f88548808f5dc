"""Writes the planner's current table into docs/low_memory.md: `python bench/low_memory_page.py`."""

from __future__ import annotations

from pathlib import Path

from bagel_ds.memory.table import table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "low_memory.md"
BEGIN, END = "<!-- bagel-ds memory --table -->", "<!-- end of the table -->"


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
