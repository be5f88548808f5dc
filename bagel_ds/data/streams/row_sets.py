"""Sets of row numbers, one bit per row of the whole range: of 100 million rows 12 MiB, less while few are in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class RowSet:
    """A set of rows out of 0 to `rows` - 1."""

    def __init__(self, rows: int) -> None:
        self._bits = np.zeros(rows // 8 + 1, np.uint8)  # the system gives memory where something is written
        self._count = 0

    def add(self, row: int) -> bool:
        """Whether the row was not in the set yet."""
        if row in self:
            return False
        self._bits[row >> 3] |= 1 << (row & 7)
        self._count += 1
        return True

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] >> (row & 7) & 1)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for byte in np.flatnonzero(self._bits).tolist():
            bits = int(self._bits[byte])
            yield from (8 * byte + bit for bit in range(8) if bits >> bit & 1)
