"""A rank in a session of its own, so that a stop can take longer than the launcher's patience.

The `deepspeed` launcher answers a signal by SIGTERM to the processes it started and SIGKILL 30 seconds later; a step
with offload takes longer. So the process that the launcher starts only waits: the rank itself runs detached from it,
outside its process tree and process group.

Guarantees: signals to the waiting process reach the rank; it ends with the rank's exit code. When the waiting process
is killed, a rank that was asked to stop finishes its step and saves; one that was not ends at once, as if killed
itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_asked_to_stop = threading.Event()


def run_detached(rank_main: Callable[[], int]) -> int:
    """Run `rank_main` in a detached process and wait for it; its exit code. Call before torch is imported.

    With BAGEL_DS_DETACH=0 it runs right here (for debuggers).
    """
    if os.environ.get("BAGEL_DS_DETACH") == "0":
        return rank_main()
    sys.stdout.flush()
    sys.stderr.flush()
    said_read, said_write = os.pipe()  # rank -> waiting process: pid, then exit code
    alive_read, alive_write = os.pipe()  # closes when the waiting process is gone
    if (middle := os.fork()) == 0:
        os.close(said_read)
        os.close(alive_write)
        _become_rank(rank_main, said_write, alive_read)
    os.close(said_write)
    os.close(alive_read)
    os.waitpid(middle, 0)
    return _wait(said_read)


def asked_to_stop() -> None:
    """Note in the rank that a stop was asked for: from now on it outlives the waiting process."""
    _asked_to_stop.set()


def _become_rank(rank_main: Callable[[], int], said: int, alive: int) -> None:
    """In the middle process: leave session and parent, run, report; never returns."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.write(said, f"{os.getpid()}\n".encode())
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    code = 1
    try:
        code = rank_main()
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(said, f"{code}\n".encode())
        os._exit(code)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end is closed
    if not _asked_to_stop.is_set():
        os._exit(137)


def _wait(said: int) -> int:
    """In the process that the launcher started: pass signals on, wait for the rank's exit code."""
    lines = os.fdopen(said)
    rank = int(lines.readline())

    def forward(number: int, _: object) -> None:
        try:
            os.kill(rank, number)
        except ProcessLookupError:
            pass

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    code = lines.readline().strip()
    return int(code) if code else 137  # the rank was killed
