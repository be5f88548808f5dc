"""The server: a fresh interpreter that imports the data package and forks a worker on request.

A process with native threads must not be forked: a thread that is entering Python at that moment holds a lock of the
interpreter, which then stays locked in the child (python/cpython#112275). This process has one thread.

Guarantees: when the process that started the server ends, for whatever reason, the kernel kills the server and all
workers, or they end within a second. The server and workers ignore stop signals: the starter decides when to stop.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SHOW_STACKS = signal.SIGUSR2
BLOCKED_SIGNALS = (*STOP_SIGNALS, SHOW_STACKS)  # while a server starts: it would end by them
# What the starter asks for.
SHARE, START, END = "share", "start", "end"

_LOOK_SECONDS = 1.0  # between two checks that the starter still runs; its end also closes the connection
_KILL_SECONDS = 5.0  # for a killed process to end; one that waits for a dead file system does not
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def main(descriptor: int, starter: int) -> None:
    """Serve process `starter` over its socket until it ends or closes it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS, all_threads=True)  # before the imports, which may hang
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)  # the starter has blocked them until here
    control = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the starter has ended or closed it
        _serve(control, starter)


def _serve(control: Connection, starter: int) -> None:
    sys.path[:], preload = control.recv()
    for name in preload:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise collections in workers write to, and so copy, every page of objects made here
    control.send(native_threads())
    server = _Server(control)
    while os.getppid() == starter:
        if control.poll(_LOOK_SECONDS):
            request, *details = control.recv()
            control.send(server.answer(request, *details))


def native_threads() -> list[str]:
    """Names of this process's threads, except the calling one."""
    tasks = Path("/proc/self/task")
    others = [task for task in tasks.iterdir() if task.name != str(os.getpid())]
    return [(task / "comm").read_text().strip() for task in others]


class _Server:
    """`shared` is the first argument of every worker's function; workers share its memory until one writes to it."""

    def __init__(self, control: Connection) -> None:
        self._control, self._pid = control, os.getpid()
        self._shared: Any = None

    def answer(self, request: str, *details: Any) -> Any:
        if request == SHARE:
            (self._shared,) = details
            gc.collect()
            gc.freeze()
            return None
        return self._start() if request == START else _end(*details)

    def _start(self) -> int | str:
        """A worker's process id, or why none could be started. The worker's end of a socket comes with the request."""
        descriptor = recv_handle(self._control)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(descriptor)
            return str(error.strerror)
        if pid == 0:
            self._become_worker(descriptor)
        os.close(descriptor)
        return pid

    def _become_worker(self, descriptor: int) -> NoReturn:
        code = 1
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._pid:  # the server ended before prctl
                os._exit(code)
            self._control.close()
            run(Connection(descriptor), self._shared)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def run(connection: Connection, shared: Any) -> None:
    """In a worker: take over the starter's path, folder and environment, then call the function that it sends."""
    path, folder, environment = connection.recv()
    sys.path[:] = path
    if folder is not None:
        os.chdir(folder)
    os.environ.update(environment)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    function, arguments = connection.recv()
    function(connection, shared, *arguments)


def _end(pid: int, patience: float) -> int | None:
    """Wait `patience` seconds for a worker, then kill it; its exit code (-9: SIGKILL), None if it can't be killed."""
    for seconds in (patience, _KILL_SECONDS):
        deadline = time.monotonic() + seconds
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
    return None
