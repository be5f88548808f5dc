"""A rank in a session of its own, so that a stop can take longer than the launcher's patience.

The `deepspeed` launcher answers a signal by SIGTERM to the processes it started and SIGKILL 30 seconds later; a step
with offload takes longer. So the process that the launcher starts only waits: the rank itself runs detached from it,
outside its process tree and process group.

Guarantees: signals to the waiting process reach the rank, SIGHUP as SIGTERM, and so does SIGTERM when the launcher is
gone; it ends with the rank's exit code. When the waiting process is killed, a rank that was asked to stop finishes its
step and saves; one that was not ends at once, as if killed itself. Nothing that a rank has started outlives it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, NoReturn

from bagel_ds.machine.output import say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.5
_TRACEBACK_SECONDS = 1.0  # in which the `deepspeed` command has printed where Ctrl-C met it
_KILLED = 137  # as a shell says of a process that was killed
_asked_to_stop = threading.Event()
_said: int | None = None  # in a detached rank: where its exit code goes


def run_detached(rank_main: Callable[[], int], speaks: bool = True) -> int:
    """Run `rank_main` in a detached process and wait for it; its exit code. Call before torch is imported.

    With BAGEL_DS_DETACH=0 it runs right here (for debuggers). `speaks` is for one of the ranks that a signal ends.
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
    return _wait(said_read, middle, speaks)


def asked_to_stop() -> None:
    """Note in the rank that a stop was asked for: from now on it outlives the waiting process."""
    _asked_to_stop.set()


def end_at_once(code: int) -> NoReturn:
    """End this rank and, where it is detached, all that it has started."""
    if _said is not None:
        _say(code)
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


def process_state(pid: int) -> str | None:
    """The kernel's letter for what a process does ("R" runs, "T" is stopped, ...); None where it has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if state in "ZX" else state


def _say(number: int) -> None:
    assert _said is not None
    with suppress(BrokenPipeError):  # the waiting process is gone
        os.write(_said, f"{number}\n".encode())


def _become_rank(rank_main: Callable[[], int], said: int, alive: int) -> NoReturn:
    """In the middle process: leave session and parent, run, report."""
    global _said
    os.setsid()
    if os.fork():
        os._exit(0)
    _said = said
    _say(os.getpid())
    # Until training listens for them, signals end the rank at once, also inside a call that Python can't interrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    code = 1
    try:
        code = rank_main()
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        end_at_once(code)
    _say(code)
    os._exit(code)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end is closed
    if not _asked_to_stop.is_set():
        end_at_once(_KILLED)


def _wait(said: int, group: int, speaks: bool) -> int:
    """In the process that the launcher started: pass signals on, wait for the rank's exit code."""
    lines = os.fdopen(said)
    rank = int(lines.readline())
    launcher = _Launcher(speaks)
    listened = {n for n in (*STOP_SIGNALS, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN}  # nohup's SIGHUP
    signal.pthread_sigmask(signal.SIG_BLOCK, listened)
    passed_on: list[int] = []
    while not select.select([lines], [], [], 0)[0] and process_state(rank):
        found = signal.sigtimedwait(listened, _POLL_SECONDS)
        if found is not None and not (passed_on and launcher.sent(found)):
            if found.si_signo == signal.SIGINT and not passed_on:
                launcher.let_end()
            passed_on.append(found.si_signo)
            _pass_on(rank, found.si_signo)
        elif not passed_on and launcher.is_gone():
            say("the launcher is gone: stopping after this step")
            passed_on.append(signal.SIGTERM)
            _pass_on(rank, signal.SIGTERM)
    code = lines.readline().strip() if select.select([lines], [], [], 0)[0] else ""
    if code:
        return int(code)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)  # what a rank that was killed has started
    if not passed_on:
        return _KILLED
    if speaks:
        say(f"ended by {signal.Signals(passed_on[-1]).name}; nothing was saved")
    return 128 + passed_on[-1]


def _pass_on(rank: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(rank, signal.SIGTERM if number == signal.SIGHUP else number)
        os.kill(rank, signal.SIGCONT)  # a stopped process would never see the first


class _Launcher:
    """DeepSpeed's per-host launcher, which started this process, and the `deepspeed` command that started that one.

    The latter ends on SIGTERM and SIGINT without telling the former, which by itself would train on. The former turns
    a signal of its own into SIGTERM to one rank after the other, 30 seconds apart: after Ctrl-C, which has reached all
    ranks, that is no second wish.
    """

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._launcher = os.getppid()
        self._command = parent_of(self._launcher)
        self._watches_launcher = is_deepspeed(self._launcher)
        self._watches_command = self._watches_launcher and is_deepspeed(self._command)

    def sent(self, found: signal.struct_siginfo) -> bool:
        return self._watches_launcher and found.si_pid == self._launcher

    def let_end(self) -> None:
        """After Ctrl-C: the command prints a traceback, which would stand between the lines of the run."""
        if not self._watches_launcher:
            return
        time.sleep(_TRACEBACK_SECONDS)
        if self._speaks:
            say("Ctrl-C has ended the launcher: a KeyboardInterrupt above is its own, and no error of this run")

    def is_gone(self) -> bool:
        if not self._watches_launcher:
            return False
        if os.getppid() != self._launcher:
            return True
        return self._watches_command and parent_of(self._launcher) != self._command


def parent_of(pid: int | str) -> int:
    """The process that has started `pid` ("self" for this one), or that has taken it in; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def is_deepspeed(pid: int) -> bool:
    """Whether this is `deepspeed`, `ds` or `python -m deepspeed.launcher.launch`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:5]
    except OSError:
        return False
    return any(Path(word).name.startswith("deepspeed") or Path(word).name == "ds" for word in words)
