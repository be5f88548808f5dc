"""Keeps what other packages print at every start from drowning what a run has to say.

Guarantees: only the lines named here are held back, each with its reason; errors and every other warning stay.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from typing import Iterator, TextIO

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed; they do what they did.
_RENAMED = r"`torch\.distributed\.\w+` is deprecated"
# DeepSpeed prints this on every rank of a CPU run.
_BUILT = re.compile(r"DeepSpeed \S+ built successfully")


def quiet_warnings() -> None:
    """Hold back, for the rest of the process, warnings of other packages that a user can do nothing about."""
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)


@contextmanager
def quiet_start() -> Iterator[None]:
    """While the process group starts: drop DeepSpeed's "built successfully", pass every other line on as it comes."""
    lines = _Lines(sys.stdout)
    try:
        with redirect_stdout(lines):
            yield
    finally:
        lines.end()


class _Lines(io.TextIOBase):
    """Hands whole lines to `target`, but for those that are not wanted."""

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
        """Hand on what no line feed has ended."""
        self._target.write(self._begun)
        self._target.flush()
