"""A rank that fails while others go on exits immediately.

Guarantees: its message or traceback is printed first, and the other ranks are notified and end within seconds. Nothing
is closed, because closing waits for ranks that are in another call (under NCCL even the end of the process group does).
A `SharedFault`, and any failure of a single-rank run, unwinds as usual.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bagel_ds.errors import UserError
from bagel_ds.train.process.detach import STOP_SIGNALS, end_at_once
from bagel_ds.train.ranks import alarm
from bagel_ds.train.ranks.agreement import SharedFault

_SHOWN = 160  # characters of a failure, on other ranks


@contextmanager
def ending_alone(explain: Callable[[BaseException], UserError | None]) -> Iterator[None]:
    """A failure of this rank in the block ends the process before anything outside the block sees it.

    `explain` turns errors that a user can fix, such as too little memory, into a message.
    """
    try:
        yield
    except (SharedFault, SystemExit):
        raise
    except BaseException as error:
        fault = error if isinstance(error, UserError) else explain(error)
        if alarm.is_listening():
            _end(error, fault)
        if fault is None or fault is error:
            raise
        raise fault from None


def _end(error: BaseException, fault: UserError | None) -> None:
    if fault is None:
        _end_after_others(error)
    broken = alarm.broken_connection(str(error)) if fault is None else None
    if fault is not None:
        print(f"ERROR: {fault}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    if broken is not None:
        print(f"[rank {alarm.own_rank()}] {broken}; ending this rank, too", file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    why = broken or str(fault or repr(error)).splitlines()[0]
    alarm.sound(why if len(why) <= _SHOWN else why[:_SHOWN] + "...")
    end_at_once(1 if fault is None else 2)


def _end_after_others(error: BaseException) -> None:
    """End this rank with a line instead of a traceback if `error` follows from the end of another rank."""
    first = alarm.heard()
    killed = alarm.ended_neighbors(error) if first is None else None  # it has notified nobody
    if killed is not None:
        first = alarm.heard() or killed  # also if it has failed between the two
    if first is None:
        return
    for number in STOP_SIGNALS:  # from the launcher, which has seen the other rank end
        signal.signal(number, signal.SIG_IGN)
    alarm.close()  # it would say the same
    print(f"[rank {alarm.own_rank()}] {first}; ending this rank, too", file=sys.stderr, flush=True)
    if first == killed:
        alarm.sound(first)
    time.sleep(alarm.GRACE_SECONDS)
    end_at_once(1)
