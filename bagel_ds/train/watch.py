"""A rank that stalls makes every rank say where it is, and ends the job.

Guarantees: when a phase (data, step, save, ...) of this rank lasts longer than the timeout, it prints its Python stacks
and which ranks are behind or silent, and the process ends with code 1 rather than hanging. Ranks know of each other
through one small file each in a shared folder, written by a thread, so a rank that is stuck in a collective call still
reports.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

HEARTBEATS = ".heartbeats"
SILENT_SECONDS = 30.0  # a rank whose file is older is not running


class StallWatch:
    """One per rank; `timeout` in seconds, 0 for none. `folder` is seen by all hosts (the checkpoint_dir)."""

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float):
        self._folder, self._rank, self._world_size, self._timeout = folder / HEARTBEATS, rank, world_size, timeout
        self._place: tuple[int, str] = (0, "start")
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if timeout > 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    @contextmanager
    def phase(self, step: int, name: str) -> Iterator[None]:
        """What this rank does from here to the end of the block."""
        self._place, self._since = (step, name), time.monotonic()
        yield
        self._place, self._since = (step, f"after {name}"), time.monotonic()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._file(self._rank).unlink(missing_ok=True)
            try:
                self._folder.rmdir()
            except OSError:
                pass  # other ranks are still in it

    def _run(self) -> None:
        interval = min(5.0, self._timeout / 4)
        while not self._closed.wait(interval):
            self._write()
            if time.monotonic() - self._since > self._timeout:
                self._end()

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.json"

    def _write(self) -> None:
        step, phase = self._place
        content = {"step": step, "phase": phase, "seconds": time.monotonic() - self._since}
        content |= {"host": socket.gethostname(), "pid": os.getpid()}
        beside = self._file(self._rank).with_suffix(".new")
        try:
            beside.write_text(json.dumps(content))
            beside.replace(self._file(self._rank))
        except OSError:
            pass  # a full disk is told where something is saved

    def _end(self) -> None:
        step, phase = self._place
        lines = [
            f"[rank {self._rank}] stalled: {phase} of step {step} lasts longer than --stall_timeout {self._timeout:g} s"
        ]
        ranks = self._ranks()
        lines += [f"[rank {self._rank}]   {describe(rank, found)}" for rank, found in enumerate(ranks)]
        lines.append(
            f"[rank {self._rank}] missing: {', '.join(missing(ranks)) or 'no rank; all wait in the same place'}"
        )
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(min(5.0, self._timeout))  # so that the others, which see the same, can say so too
        self._kill_silent(ranks)
        os._exit(1)

    def _ranks(self) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for rank in range(self._world_size):
            try:
                content = json.loads(self._file(rank).read_text())
                content["silent"] = time.time() - self._file(rank).stat().st_mtime
            except (OSError, ValueError):
                content = None
            found.append(content)
        return found

    def _kill_silent(self, ranks: list[dict[str, Any] | None]) -> None:
        """A stopped process of this host would outlive the job."""
        for found in ranks:
            if found and is_silent(found) and found["host"] == socket.gethostname():
                try:
                    os.kill(found["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    pass


def is_silent(found: dict[str, Any]) -> bool:
    return found["silent"] > SILENT_SECONDS


def describe(rank: int, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"rank {rank}: never heard of"
    silent = f", not heard of for {found['silent']:.0f} s" if is_silent(found) else ""
    return (
        f"rank {rank} on {found['host']}: step {found['step']}, {found['phase']} for {found['seconds']:.0f} s{silent}"
    )


def missing(ranks: list[dict[str, Any] | None]) -> list[str]:
    """Ranks that are silent, or behind the furthest one."""
    furthest = max((found["step"] for found in ranks if found), default=0)
    names = []
    for rank, found in enumerate(ranks):
        if found is None or is_silent(found) or found["step"] < furthest or found["phase"].endswith("data"):
            names.append(f"rank {rank}")
    return names
