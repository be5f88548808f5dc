"""Writing to stdout and stderr without failing.

Guarantees: a character that the terminal's encoding lacks is printed as an escape, never a traceback. A command whose
reader is gone (`| head`) exits silently with the code of SIGPIPE; one whose output fills the disk reports it. A
training run continues without a reader, because its log is in log.txt and its training must be saved.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Callable, TextIO

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def escape_what_cannot_be_shown() -> None:
    """Have stdout and stderr write unknown characters, and file names that are not text, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(command: Callable[[], int]) -> int:
    """Run a command that prints its result, and return its exit code."""
    escape_what_cannot_be_shown()
    try:
        try:
            return command()
        finally:  # also when argparse has printed its help and exits
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        gone = [number for number in (1, 2) if _reader_is_gone(number)]
        if not gone:  # another pipe
            raise
        for number in gone:
            _to_nowhere(number)  # what is still in a buffer would fail again when the interpreter ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        _to_nowhere(1)
        say(f"the output can't be written: {error.strerror}")
        return 2
    except UnicodeEncodeError as error:
        if not any("\udc80" <= letter <= "\udcff" for letter in error.object):  # Python's escapes for undecodable bytes
            raise
        shown = error.object.encode("ascii", "backslashreplace").decode()[:300]
        say(f"the file name {shown} is not valid {sys.getfilesystemencoding()}: rename it, or set PYTHONUTF8=1")
        return 2


def outlive_the_reader() -> None:
    """Make writes to stdout and stderr never fail, in this process and those it forks."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a standard stream was closed (`>&-`)
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


def log_to_stderr() -> None:
    """Log a command's notes and waits to stderr, so that stdout holds only its result."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("bagel_ds")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)


def say(text: str) -> None:
    """Write a line to stderr, from a signal handler or a process without a log."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


class _Lasting(io.TextIOWrapper):
    """A stream that drops what can't be written."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno not in _NO_ROOM:  # a full disk may have room later
            _to_nowhere(self.fileno())


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        return open(descriptor, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream  # replaced by someone else, such as pytest
    return _Lasting(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _reader_is_gone(descriptor: int) -> bool:
    """Whether a descriptor is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _to_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
