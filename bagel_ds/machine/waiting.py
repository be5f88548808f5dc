"""Logs what a long wait is for.

Guarantees: a wait of less than `FIRST` seconds logs nothing. A longer one logs what it waits for and what to expect,
repeats that every `EVERY` seconds, and finally logs how long it took. A separate thread logs, so it also works while
the waiting thread is inside a call that does not return.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator

FIRST = 10.0  # seconds
EVERY = 30.0  # seconds

logger = logging.getLogger("bagel_ds")


@contextmanager
def waiting_for(what: str | Callable[[], str], usual: str = "", level: int = logging.INFO) -> Iterator[None]:
    """Put this around work that may take long. `what` completes "waiting for", `usual` says what to expect.

    If `what` is a function, it is called before each line, and "" logs nothing.
    """
    text = what if callable(what) else lambda: what
    began, ended = time.monotonic(), threading.Event()
    thread = threading.Thread(target=_speak, args=(text, usual, level, began, ended), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _speak(what: Callable[[], str], usual: str, level: int, began: float, ended: threading.Event) -> None:
    said, pause = "", FIRST
    while not ended.wait(pause):
        if text := what():
            expected = f"; {usual}" if usual and not said else ""
            logger.log(level, "waiting for %s (%.0f s%s)", text, time.monotonic() - began, expected)
            said = text
        elif said:
            _log_end(said, level, began)
            said = ""
        pause = EVERY
    if said:
        _log_end(said, level, began)


def _log_end(said: str, level: int, began: float) -> None:
    logger.log(level, "waited %.0f s for %s", time.monotonic() - began, said)
