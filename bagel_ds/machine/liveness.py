"""Long work says that it goes on, so that the stall watch can tell it from work that hangs.

Guarantees: nothing happens where nobody listens, as in the commands and in worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listener: Callable[[], None] | None = None
_timed_elsewhere = 0


def going_on() -> None:
    """Call after each piece of work that as a whole may take longer than anybody waits."""
    if _listener is not None:
        _listener()


def listen(listener: Callable[[], None] | None) -> None:
    """Have `going_on` call `listener`; None ends that."""
    global _listener
    _listener = listener


@contextmanager
def timed_elsewhere() -> Iterator[None]:
    """Around what can't say that it goes on and ends by itself: a download, which has timeouts, or a compiler."""
    global _timed_elsewhere
    _timed_elsewhere += 1
    try:
        yield
    finally:
        _timed_elsewhere -= 1
        going_on()


def is_timed_elsewhere() -> bool:
    return _timed_elsewhere > 0
