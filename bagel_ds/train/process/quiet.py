"""Suppresses a few lines that other packages print at every start.

Guarantees: only the lines listed here are suppressed, each for a stated reason; errors and other warnings stay.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from typing import Iterator, TextIO

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates; they still work.
_RENAMED = r"`torch\.distributed\.\w+` is deprecated"
# DeepSpeed prints this on every rank of a CPU run.
_BUILT = re.compile(r"DeepSpeed \S+ built successfully")


def quiet_warnings() -> None:
    """Suppress, for the rest of the process, warnings of other packages that a user can't act on."""
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)


@contextmanager
def quiet_start() -> Iterator[None]:
    """While the process group starts: drop DeepSpeed's "built successfully" and pass on every other line."""
    lines = _Lines(sys.stdout)
    try:
        with redirect_stdout(lines):
            yield
    finally:
        lines.end()


class _Lines(io.TextIOBase):
    """Writes whole lines to `target`, except the suppressed ones."""

    def __init__(self, target: TextIO) -> None:
        self._target, self._begun = target, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            if not _BUILT.fullmatch(line.strip()):
                self._target.write(line + "\n")
        self._target.flush()
        return len(text)

    def end(self) -> None:
        """Write the last, unfinished line."""
        self._target.write(self._begun)
        self._target.flush()
