"""A rank in its own session, so that a stop may take longer than the launcher waits.

On a signal the `deepspeed` launcher sends SIGTERM to the processes it started, and SIGKILL 30 seconds later; a step
with offload takes longer. So the process that the launcher starts only waits, and the rank runs detached from it,
outside its process tree and process group.

Guarantees: signals to the waiting process reach the rank (SIGHUP as SIGTERM); if the launcher is gone, the rank gets
SIGTERM. The waiting process ends with the rank's exit code. If it is killed, a rank that was asked to stop finishes its
step and saves; otherwise the rank exits immediately. Nothing that a rank has started outlives it.
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
_TRACEBACK_SECONDS = 1.0  # for the `deepspeed` command to print its traceback
_KILLED = 137  # a shell's code for a killed process
_asked_to_stop = threading.Event()
_report_to: int | None = None  # in a detached rank: descriptor for its exit code


def run_detached(rank_main: Callable[[], int], reports: bool = True) -> int:
    """Run `rank_main` in a detached process and return its exit code. Call it before torch is imported.

    With BAGEL_DS_DETACH=0 it runs in this process (for debuggers). The rank that `reports` says how a signal ended it.
    """
    if os.environ.get("BAGEL_DS_DETACH") == "0":
        return rank_main()
    sys.stdout.flush()
    sys.stderr.flush()
    report_read, report_write = os.pipe()  # rank -> waiting process: pid, then exit code
    alive_read, alive_write = os.pipe()  # closes when the waiting process is gone
    if (middle := os.fork()) == 0:
        os.close(report_read)
        os.close(alive_write)
        _become_rank(rank_main, report_write, alive_read)
    os.close(report_write)
    os.close(alive_read)
    os.waitpid(middle, 0)
    return _wait(report_read, middle, reports)


def asked_to_stop() -> None:
    """Note in the rank that it was asked to stop: from now on it outlives the waiting process."""
    _asked_to_stop.set()


def end_at_once(code: int) -> NoReturn:
    """End this rank and, if it is detached, everything it has started."""
    if _report_to is not None:
        _report(code)
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


def process_state(pid: int) -> str | None:
    """The kernel's letter for a process's state ("R" running, "T" stopped, ...); None if it has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if state in "ZX" else state


def _report(number: int) -> None:
    assert _report_to is not None
    with suppress(BrokenPipeError):  # the waiting process is gone
        os.write(_report_to, f"{number}\n".encode())


def _become_rank(rank_main: Callable[[], int], report_to: int, alive: int) -> NoReturn:
    """In the middle process: leave session and parent, run, report."""
    global _report_to
    os.setsid()
    if os.fork():
        os._exit(0)
    _report_to = report_to
    _report(os.getpid())
    # Until training handles signals, they end the rank immediately, also inside a call that Python can't interrupt.
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
    _report(code)
    os._exit(code)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end is closed
    if not _asked_to_stop.is_set():
        end_at_once(_KILLED)


def _wait(report: int, group: int, reports: bool) -> int:
    """In the process that the launcher started: forward signals and wait for the rank's exit code."""
    # Unbuffered, so that `select` sees the exit code also if it was written before the pid was read.
    lines = os.fdopen(report, "rb", buffering=0)
    rank = int(lines.readline())
    launcher = _Launcher(reports)
    # Not the ignored ones: nohup ignores SIGHUP.
    listened = {n for n in (*STOP_SIGNALS, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN}
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
    code = lines.readline() if select.select([lines], [], [], 0)[0] else b""
    if code:
        return int(code)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)  # what a killed rank has started
    if not passed_on:
        return _KILLED
    if reports:
        say(f"ended by {signal.Signals(passed_on[-1]).name}; nothing was saved")
    return 128 + passed_on[-1]


def _pass_on(rank: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(rank, signal.SIGTERM if number == signal.SIGHUP else number)
        os.kill(rank, signal.SIGCONT)  # a stopped process would never see the first


class _Launcher:
    """DeepSpeed's per-host launcher, which started this process, and the `deepspeed` command that started the launcher.

    The command ends on SIGTERM and SIGINT without ending the launcher, which would train on. The launcher turns a
    signal into SIGTERM to one rank after the other, 30 seconds apart. Ctrl-C reaches all ranks directly, so the SIGTERM
    that then follows is not a second request.
    """

    def __init__(self, reports: bool) -> None:
        self._reports = reports
        self._launcher = os.getppid()
        self._command = parent_of(self._launcher)
        self._watches_launcher = is_deepspeed(self._launcher)
        self._watches_command = self._watches_launcher and is_deepspeed(self._command)

    def sent(self, found: signal.struct_siginfo) -> bool:
        return self._watches_launcher and found.si_pid == self._launcher

    def let_end(self) -> None:
        """After Ctrl-C, wait for the command's traceback, which would mix with the lines of the run."""
        if not self._watches_launcher:
            return
        time.sleep(_TRACEBACK_SECONDS)
        if self._reports:
            say("Ctrl-C has ended the launcher; a KeyboardInterrupt above comes from the launcher, not from this run")

    def is_gone(self) -> bool:
        if not self._watches_launcher:
            return False
        if os.getppid() != self._launcher:
            return True
        return self._watches_command and parent_of(self._launcher) != self._command


def parent_of(pid: int | str) -> int:
    """The parent of `pid` ("self" for this process), or its adopter; 0 if `pid` has ended."""
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
