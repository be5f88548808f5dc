"""Progress over rows or files: a bar on a terminal, elsewhere lines in the log.

Guarantees: a log file stays readable: whole lines, at most one per `EVERY` seconds.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from bagel_ds.machine.liveness import going_on

logger = logging.getLogger("bagel_ds")

EVERY = 15.0  # seconds between two lines


class RowProgress:
    """A context manager; `update` by rows (or another `unit`) done. Shows nothing unless `shown`."""

    def __init__(self, total: int, what: str, shown: bool, unit: str = "row") -> None:
        self._total, self._what, self._unit = total, what, unit
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=unit, desc=what, disable=not (shown and terminal), leave=False)
        self._in_lines = shown and not terminal
        self._done = 0
        self._began = self._last_line = time.monotonic()

    def update(self, done: int) -> None:
        going_on()
        self._done += done
        self._bar.update(done)
        now = time.monotonic()
        if self._in_lines and now - self._last_line >= EVERY:
            self._last_line = now
            speed = self._done / (now - self._began)
            share = self._done / max(self._total, 1)
            logger.info(
                "%s: %d of %d %ss (%.0f %%), %.0f %ss/s",
                *(self._what, self._done, self._total, self._unit, 100 * share, speed, self._unit),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
