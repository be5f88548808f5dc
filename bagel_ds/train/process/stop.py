"""Requests to end a run before its last step: signals, a stop file, a time limit.

Guarantees: a request on one rank stops all ranks after the same step, which is finished and saved first. Signals within
5 seconds count as one (Ctrl-C reaches launcher and ranks); a later one ends the rank immediately.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from types import FrameType

from bagel_ds.errors import UserError
from bagel_ds.machine.output import say
from bagel_ds.train.process.detach import STOP_SIGNALS, asked_to_stop, end_at_once

logger = logging.getLogger("bagel_ds")

STOP_FILE = "stop"
SAME_SIGNAL_SECONDS = 5.0


class StopRequest:
    """Make it where training begins; the step calls `wanted` after its update."""

    def __init__(self, folders: list[Path], stop_after: float | None, watches_file: bool):
        self._files = [folder / STOP_FILE for folder in folders] if watches_file else []
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._signalled_at: float | None = None
        self._reason: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def wanted(self) -> str | None:
        """Why this rank should stop, or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "--stop_after has passed"
        if self._reason is None and any(path.exists() for path in self._files):
            self._reason = "a stop file was written"
        return self._reason

    def remove_files(self) -> None:
        """Call when the run stops, so that the next start trains on."""
        for path in self._files:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s can't be removed (%s): remove it before the next start", path, error.strerror)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is not None and now - self._signalled_at > SAME_SIGNAL_SECONDS:
            say("second signal: stopping immediately, without saving")
            end_at_once(128 + number)
        if self._signalled_at is None:
            self._signalled_at = now
            self._reason = f"{signal.Signals(number).name} received"
            asked_to_stop()
            say("stopping after this step, then saving (a second signal after 5 s stops immediately)")


def forget_stops(folders: list[Path]) -> None:
    """Remove stop files of an earlier run; one written from now on counts. Raises `UserError`."""
    for folder in folders:
        path = folder / STOP_FILE
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path} asks this run to stop and can't be removed ({error.strerror}); "
                "remove it, or pass another folder"
            ) from None


def write_stop_file(folder: Path) -> Path:
    """Ask the run with this results_dir or checkpoint_dir to stop; returns the file. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the results_dir or checkpoint_dir of the run to stop")
    path = folder / STOP_FILE
    try:
        path.touch()
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}); stop the run as the user who started it"
        ) from None
    return path
