"""Signs of life from long work, so that the stall watch can tell it from work that hangs.

Guarantees: without a listener, as in commands and worker processes, a sign of life does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listener: Callable[[], None] | None = None
_timed_elsewhere = 0


def going_on() -> None:
    """Call regularly during work that may take longer than the stall watch waits."""
    if _listener is not None:
        _listener()


def listen(listener: Callable[[], None] | None) -> None:
    """Have `going_on` call `listener`, or nothing if it is None."""
    global _listener
    _listener = listener


@contextmanager
def timed_elsewhere() -> Iterator[None]:
    """Put this around work that can't give signs of life but ends by itself: a download with timeouts, a compiler."""
    global _timed_elsewhere
    _timed_elsewhere += 1
    try:
        yield
    finally:
        _timed_elsewhere -= 1
        going_on()


def is_timed_elsewhere() -> bool:
    return _timed_elsewhere > 0
