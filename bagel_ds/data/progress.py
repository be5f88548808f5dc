"""Progress over rows: a bar on a terminal, a line in the log now and then elsewhere.

Guarantees: what is written to a file stays readable: whole lines, at most one per `EVERY` seconds. Shows nothing when
it is told so.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger("bagel_ds")

EVERY = 15.0  # seconds between two lines


class RowProgress:
    """A context manager; `update` by rows done."""

    def __init__(self, total: int, what: str, shown: bool) -> None:
        self._total, self._what = total, what
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="row", desc=what, disable=not (shown and terminal), leave=False)
        self._in_lines = shown and not terminal
        self._done = 0
        self._began = self._told = time.monotonic()

    def update(self, rows: int) -> None:
        self._done += rows
        self._bar.update(rows)
        now = time.monotonic()
        if self._in_lines and now - self._told >= EVERY:
            self._told = now
            speed = self._done / (now - self._began)
            share = self._done / max(self._total, 1)
            logger.info(
                "%s: %d of %d rows (%.0f %%), %.0f rows/s", self._what, self._done, self._total, 100 * share, speed
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
