"""What tests run in worker processes, in a module of its own so that they can import it."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.source import ParsedRow
from bagel_ds.data.formats.t2i import TextToImage
from bagel_ds.errors import UserError


def surroundings(connection: Connection, shared: Any) -> None:
    """Say what this process is."""
    found = {
        "threads": len(os.listdir("/proc/self/task")),
        "parent": os.getppid(),
        "modules": set(sys.modules),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "shared": shared,
    }
    connection.send(found)


def greet(connection: Connection, shared: Any, greeting: Any) -> None:
    connection.send(greeting)


def greet_twice(connection: Connection, shared: Any, greeting: Any) -> None:
    """The second time with what comes in."""
    connection.send(greeting)
    connection.send(connection.recv())


def stay(connection: Connection, shared: Any, how: str) -> None:
    """Say the process id, then stay without ever looking at the connection again."""
    connection.send(os.getpid())
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "ignoring":  # holding the interpreter's lock
        ctypes.PyDLL(None).sleep(100)
    while True:
        time.sleep(1)


def lost(connection: Connection, shared: Any, what: str) -> None:
    """End in one way or another, without a result."""
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crashed":
        faulthandler._sigsegv()
    if what == "exited":
        os._exit(3)
    if what == "raised":
        raise RuntimeError("a bug outside of any task")


def doubled(factor: int, task: Any) -> Any:
    return factor * task


def slept(shared: Any, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def counted(shared: Any, task: str) -> Any:
    """Do what the task's name says."""
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raised":
        raise KeyError(task)
    if task == "refused":
        raise UserError("this can't be used")
    return (lambda: None) if task == "unsendable" else len(task)


class Sleeping(TextToImage):
    """A format whose rows take long; a process that reads one prints its id first."""

    def parse(self, row: dict[str, Any], folder: str) -> ParsedRow:
        print(os.getpid(), flush=True)
        time.sleep(1000)
        return super().parse(row, folder)


class Killing(TextToImage):
    """A format whose third row ends the process that reads it, as the kernel does where memory runs out."""

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        if "third" in row["captions"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().parse(row, folder)
