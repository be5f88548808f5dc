"""Long waits say what they are for.

Guarantees: a wait that ends within `FIRST` seconds says nothing. A longer one says in the log what is waited for and
what is usual, again every `EVERY` seconds, and at its end how long it took. A thread of its own does so, which also
speaks while the waiting one is inside a call that does not return.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator

FIRST = 10.0  # seconds of silence
EVERY = 30.0

logger = logging.getLogger("bagel_ds")


@contextmanager
def waiting_for(what: str | Callable[[], str], usual: str = "") -> Iterator[None]:
    """Around whatever may take long; `what` completes "waiting for", `usual` says what to expect of it.

    Where `what` is a function it is asked each time, and says "" while there is nothing to say.
    """
    text = what if callable(what) else lambda: what
    began, ended = time.monotonic(), threading.Event()
    thread = threading.Thread(target=_speak, args=(text, usual, began, ended), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _speak(what: Callable[[], str], usual: str, began: float, ended: threading.Event) -> None:
    said, pause = "", FIRST
    while not ended.wait(pause):
        if text := what():
            expected = f"; {usual}" if usual and not said else ""
            logger.info("waiting for %s (%.0f s%s)", text, time.monotonic() - began, expected)
            said = text
        pause = EVERY
    if said:
        logger.info("waited %.0f s for %s", time.monotonic() - began, said)
