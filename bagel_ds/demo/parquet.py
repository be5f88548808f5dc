"""Writing the demo's parquet files and the `parquet_info` files that list their row groups.

Guarantees: rows are in the given order, in as many row groups as requested (fewer only if there are fewer rows).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, row_groups: int) -> None:
    """Write `rows` to `path` in `row_groups` row groups of about equal size. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=math.ceil(len(rows) / row_groups))


def write_info(root: Path, info: Path, names: list[str]) -> None:
    """Write {path: {"num_row_groups", "num_rows"}} for the parquet files `names` (paths relative to `root`)."""
    entries = {}
    for name in names:
        footer = pq.read_metadata(root / name)
        entries[name] = {"num_row_groups": footer.num_row_groups, "num_rows": footer.num_rows}
    info.parent.mkdir(parents=True, exist_ok=True)
    info.write_text(json.dumps(entries, indent=2) + "\n")
