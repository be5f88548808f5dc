"""Workers from the starter's side: what it sends, what comes back, and how they ended.

Guarantees: an exception in a worker arrives as `WorkerFailed` with the worker's traceback; the end of a worker, for
whatever reason, as `WorkerLost`, which says how it ended and what it was doing. Nothing waits for a lost worker. `end`
leaves no process behind.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.processes.server import BLOCKED_SIGNALS, END, SHARE, SHOW_STACKS, START

logger = logging.getLogger("bagel_ds")

_PRELOAD = ("bagel_ds.data.batches.loader", "bagel_ds.data.inspect.check")
# No threads in the server: none of OpenMP, numpy's BLAS, `tokenizers` and Arrow's allocator.
_NO_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_NO_THREADS |= {"TOKENIZERS_PARALLELISM": "false", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
# Return freed blocks to the system, as ranks do (`train/process/allocators.py`): packs are large and short-lived. Use
# those below 8 MiB, such as single pictures, again: fresh pages would take a seventh of a worker's time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**23), "MALLOC_TRIM_THRESHOLD_": str(2**24), "MALLOC_ARENA_MAX": "2"}
_NO_PROCESS = "no process can be started: {}. Limits are the number of processes (`ulimit -u`) and memory."
_OUT_OF_MEMORY = " (the kernel kills processes when memory runs out; `dmesg` shows it; fewer workers need less)"
_STACKS_SECONDS = 0.2  # for one process to print its stacks before the next begins
_DYING_SECONDS = 5.0  # from when a worker closes its socket until it ends


class WorkerFailed(RuntimeError):
    """A worker's function raised something other than a `UserError`; the message holds its traceback."""


class WorkerLost(UserError):
    """A worker ended before its work was done."""


class _Failure(NamedTuple):
    """What a worker sends instead of a result."""

    text: str
    is_user_error: bool


def answer_tasks(
    connection: Connection, work: Callable[[Any], Any], send: Callable[[Connection, Any], None] = Connection.send
) -> None:
    """In a worker: send back `work(task)` for each task that comes, until the other side closes the connection."""
    with suppress(EOFError, ConnectionError):  # the starter has ended
        while True:
            task = connection.recv()
            try:
                send(connection, work(task))
            except UserError as error:
                connection.send(_Failure(str(error), True))
            except Exception:  # from the work, or from sending its result
                connection.send(_Failure(traceback.format_exc(), False))


class Worker:
    """A process that `start_worker` has started. `doing` says what it was asked for, as in "it read a.parquet"."""

    def __init__(self, server: _Server, pid: int, connection: Connection, name: str) -> None:
        self.pid, self.connection, self.name = pid, connection, f"{name} (process {pid})"
        self.doing: Callable[[], str] = lambda: "it had nothing to do"
        self._server, self._ending = server, threading.Lock()
        self._code: int | None = None  # known once it has ended

    def send(self, value: Any) -> None:
        """Does nothing where the worker has ended: `receive` reports that."""
        with suppress(OSError):
            self.connection.send(value)

    def receive(self, receive: Callable[[Connection], Any] = Connection.recv) -> Any:
        """What it sends next. Raises `WorkerFailed`, `WorkerLost`, or the `UserError` that it met."""
        try:
            found = receive(self.connection)
        except (EOFError, OSError):
            raise WorkerLost(f"{self.name} {self._how_it_ended()} while {self.doing()}.") from None
        if isinstance(found, _Failure):
            if found.is_user_error:
                raise UserError(found.text)
            raise WorkerFailed(f"{self.name} failed while {self.doing()}:\n{found.text}")
        return found

    def ended(self, patience: float = 0.0) -> int | None:
        """Its exit code, -9 for SIGKILL; a worker that runs on is killed after `patience` seconds."""
        with self._ending:
            if self._code is None:
                self._code = self._server.end(self.pid, patience)
            return self._code

    def end(self) -> None:
        """Kill it: it does nothing that must be finished."""
        self.ended()
        self.connection.close()

    def _how_it_ended(self) -> str:
        code = self.ended(_DYING_SECONDS)
        if code is None:
            return "does not answer, and can't be killed,"
        if code >= 0:
            return f"ended with code {code}"
        why = _OUT_OF_MEMORY if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{why}"


class _Server:
    """The server of this process; any thread may use it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.workers: dict[int, Worker] = {}
        self._asking = threading.Lock()
        self._shared: Any = None
        self.is_ready = False
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "bagel_ds.processes", str(theirs.fileno()), str(self.owner)]
        with ours, theirs, _signals_blocked():
            # Fork and exec without any Python in between: safe with any threads.
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], env=_environment(), stdin=subprocess.DEVNULL
                )
            except OSError as error:
                raise UserError(_NO_PROCESS.format(error.strerror)) from None
            self._control = Connection(ours.detach())
        self.pid = self._process.pid
        self.name = f"the process that data workers are started from (process {self.pid})"
        with suppress(OSError):  # if it has ended already, the first request reports it
            self._control.send((sys.path, _PRELOAD))

    def start(self, function: Callable[..., None], arguments: tuple[Any, ...], shared: Any, name: str) -> Worker:
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        with theirs, self._asking:
            if shared is not self._shared:
                self._ask(SHARE, shared)
                self._shared = shared
            pid = self._ask(START, descriptor=theirs.fileno())
            if isinstance(pid, str):
                connection.close()
                raise UserError(_NO_PROCESS.format(pid))
            worker = self.workers[pid] = Worker(self, pid, connection, name)
        worker.send((sys.path, _working_folder(), dict(os.environ) | _NO_THREADS))
        worker.send((function, arguments))
        return worker

    def end(self, pid: int, patience: float) -> int | None:
        """See `Worker.ended`. When the server ends, the kernel kills its workers."""
        with self._asking:
            self.workers.pop(pid, None)
            try:
                return int(code) if (code := self._ask(END, pid, patience)) is not None else None
            except WorkerLost:
                return -signal.SIGKILL

    def is_usable(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """End the server and all workers."""
        self._process.kill()
        self._process.wait()
        self._control.close()

    def _ask(self, request: str, *details: Any, descriptor: int | None = None) -> Any:
        try:
            if not self.is_ready:
                self._tell_threads(self._control.recv())
                self.is_ready = True
            self._control.send((request, *details))
            if descriptor is not None:
                send_handle(self._control, descriptor, self._process.pid)
            return self._control.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise WorkerLost(f"{self.name} ended with code {code}; its output is above") from None
        except BaseException:  # interrupted: the next request would get this one's answer
            self.close()
            raise

    def _tell_threads(self, names: list[str]) -> None:
        if names:
            logger.warning(
                "the process that data workers are forked from runs threads of libraries (%s). A worker may hang "
                "while it starts; if one does, please report these names",
                ", ".join(names),
            )


_server: _Server | None = None
_choosing = threading.Lock()


def start_server() -> None:
    """Start the server now, so that its imports are done when the first worker is needed; doesn't wait."""
    _running()


def start_worker(function: Callable[..., None], *arguments: Any, name: str, shared: Any = None) -> Worker:
    """A process that runs `function(connection, shared, *arguments)`, with this one's environment and folder.

    Arguments travel by pickle; `shared` only once for consecutive workers with the same object, which share its memory.
    `name` is for messages, as in "data worker 0". Raises `UserError`.
    """
    return _running().start(function, arguments, shared, name)


def show_stacks() -> list[str]:
    """Have all workers, or the server if it is still starting, print their stacks to stderr; their names and tasks."""
    server = _server
    if server is None or not server.is_usable():
        return []
    if server.is_ready:
        found = {worker.pid: f"{worker.name}: {worker.doing()}" for worker in list(server.workers.values())}
    else:
        found = {server.pid: f"{server.name}: it starts, or waits for its first worker"}
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, SHOW_STACKS)
        time.sleep(_STACKS_SECONDS)  # their stacks would mix: faulthandler writes in small pieces
    return list(found.values())


def _running() -> _Server:
    global _server
    with _choosing:
        if _server is None or not _server.is_usable():
            _server = _Server()
        return _server


@atexit.register
def _close() -> None:
    if _server is not None and _server.owner == os.getpid():
        _server.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A new process inherits the mask, so that no signal ends it before it has its handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**_MEMORY, **os.environ, **_NO_THREADS, "PYTHONPATH": python_path}


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None
