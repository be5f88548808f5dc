"""Which rows a plan must have used: all that its cursors have passed, but those that still wait."""

from __future__ import annotations

from typing import Any

from bagel_ds.data.plan.planner import Planner
from bagel_ds.data.plan.row_order import RowOrder

Row = tuple[int, int, int]  # group, epoch, row


def rows_used_before(planner: Planner, block: Any) -> set[Row]:
    """Every usable row that packs before a state's block have used, if none is lost."""
    found: set[Row] = set()
    for group, stream in enumerate(planner.streams):
        epoch, position, _ = block["groups"][stream.name]
        order = RowOrder(stream.units, planner.options.data_seed, stream.name)
        rows = [order.next() for _ in range(epoch * order.rows_per_epoch + position)]
        found |= {(group, epoch, row) for epoch, row in rows if stream.plan_sample(row, epoch)}
    return found - {(group, epoch, row) for group, epoch, row, _ in block["carried"]}
