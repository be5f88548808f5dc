"""Ends a job that stalls, with a report of where each rank is; also ends a rank whose neighbor has died.

Guarantees, once the ranks have met: if a phase (setup, data, engine, load, step, save, ...) of this rank makes no
progress for the timeout (`machine/liveness.py`), it prints its Python stacks, those of its workers, and which ranks are
behind or silent, and the process ends with code 1. Each rank has a thread that writes its phase to a small file in a
shared folder, so a rank that hangs in a collective call still reports. If a rank on the same host has died, for which
NCCL would wait until its timeout, this rank ends, and so do those on other hosts (alarm.py).
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Mapping

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.machine.liveness import is_timed_elsewhere, listen
from bagel_ds.processes import show_stacks
from bagel_ds.train.process.detach import end_at_once, process_state
from bagel_ds.train.ranks import alarm
from bagel_ds.train.ranks.agreement import hosts

HEARTBEATS = ".heartbeats"
SILENT_SECONDS = 90.0  # a rank whose file is so much older than this rank's is not running; NFS shows files late
_GONE_SECONDS = 10.0  # for a rank whose neighbor has ended to report its own failure first
_TURN_SECONDS = 3.0  # that a rank waits for others of its host to finish their reports


class StallWatch:
    """One per rank and process; `timeout` in seconds, 0 for none.

    All hosts see `folder` (the checkpoint_dir); until it is given, or set by `share`, ranks don't know of each other.
    `neighbors` are the process ids of the other ranks on this host, by rank.
    """

    def __init__(
        self,
        folder: Path | None,
        rank: int,
        world_size: int,
        timeout: float,
        neighbors: Mapping[int, int] | None = None,
    ):
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._folder: Path | None = None
        self._neighbors = dict(neighbors or {})
        self._interval = min(5.0, timeout / 4) if timeout > 0 else 5.0
        self._place: tuple[int, str] = (0, "start")
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if folder is not None:
            self.share(folder)
        listen(self.goes_on)
        self._thread.start()

    def share(self, folder: Path) -> None:
        """Publish this rank's phase in `folder` from now on; no other run may use it."""
        if self._timeout > 0:
            (folder / HEARTBEATS).mkdir(parents=True, exist_ok=True)
            self._folder = folder / HEARTBEATS
            self._write()  # immediately, so that the others know a rank that stops now

    def goes_on(self) -> None:
        """Restart the timeout of the present phase."""
        self._since = time.monotonic()

    @contextmanager
    def phase(self, step: int, name: str) -> Iterator[None]:
        """The block is phase `name` of step `step`."""
        self._place, self._since = (step, name), time.monotonic()
        yield
        self._place, self._since = (step, f"after {name}"), time.monotonic()

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """The block is a phase inside the present one, whose timeout restarts afterwards."""
        step, outer = self._place
        self._place, self._since = (step, name), time.monotonic()
        try:
            yield
        finally:
            self._place, self._since = (step, outer), time.monotonic()

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        listen(None)
        if self._folder is None:
            return
        with suppress(OSError):  # other ranks are still in the folder
            self._file(self._rank).unlink(missing_ok=True)
            self._folder.rmdir()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self._end_with_neighbor()
            if self._timeout > 0:
                if is_timed_elsewhere():
                    self.goes_on()
                self._write()
                if time.monotonic() - self._since > self._timeout:
                    self._end()

    def _end_with_neighbor(self) -> None:
        gone = [rank for rank, pid in self._neighbors.items() if process_state(pid) is None]
        if gone and not self._closed.wait(_GONE_SECONDS):
            names = ", ".join(f"rank {rank} (process {self._neighbors[rank]})" for rank in gone)
            print(f"[rank {self._rank}] {names} has ended; ending this rank, too", file=sys.stderr, flush=True)
            alarm.sound(f"{names} has ended")
            end_at_once(1)

    def _file(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rank_{rank}.json"

    def _write(self) -> None:
        if self._folder is None:
            return
        step, phase = self._place
        content = {"step": step, "phase": phase, "seconds": time.monotonic() - self._since}
        content |= {"host": socket.gethostname(), "pid": os.getpid()}
        beside = self._file(self._rank).with_suffix(".new")
        try:
            beside.write_text(json.dumps(content))
            beside.replace(self._file(self._rank))
        except OSError:
            pass  # a save reports a full disk

    def _end(self) -> None:
        step, phase = self._place
        lines = [
            f"[rank {self._rank}] stalled: {phase} of step {step} has taken longer than "
            f"--stall_timeout {self._timeout:g} s"
        ]
        ranks = self._ranks()
        lines += [f"[rank {self._rank}]   {describe(rank, found)}" for rank, found in enumerate(ranks)]
        if ranks:
            lines.append(
                f"[rank {self._rank}] missing: {', '.join(missing(ranks)) or 'none; all ranks are in the same phase'}"
            )
        with _turn_to_write():
            print("\n".join(lines), file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            for worker in show_stacks():
                # In one write, because the worker also writes there.
                print(f"[rank {self._rank}] asked for its stacks: {worker}\n", end="", file=sys.stderr, flush=True)
        self._signal_neighbors(ranks, signal.SIGCONT)  # so that a stopped one can also report
        time.sleep(min(5.0, self._timeout))  # for the other ranks to report
        self._signal_neighbors(self._ranks(), signal.SIGKILL)
        alarm.sound(lines[0])
        end_at_once(1)

    def _ranks(self) -> list[dict[str, Any] | None]:
        """What each rank last wrote; "silent" is how many seconds ago, by the file system's clock."""
        self._write()
        if self._folder is None:
            return []
        found: list[dict[str, Any] | None] = []
        for rank in range(self._world_size):
            try:
                content = json.loads(self._file(rank).read_text())
                age = self._file(self._rank).stat().st_mtime - self._file(rank).stat().st_mtime
                content["silent"] = age if age > min(SILENT_SECONDS, 0.75 * self._timeout) else 0.0
            except (OSError, ValueError):
                content = None
            found.append(content)
        return found

    def _signal_neighbors(self, ranks: list[dict[str, Any] | None], number: int) -> None:
        """Signal the silent ranks of this host: a stopped process would outlive the job."""
        for rank, found in enumerate(ranks):
            if found and is_silent(found) and rank in self._neighbors:
                try:
                    os.kill(self._neighbors[rank], number)
                except ProcessLookupError:
                    pass


@contextmanager
def _turn_to_write() -> Iterator[None]:
    """Write to stderr while the other ranks that share it wait.

    Ranks often stall in the same second, and faulthandler writes in small pieces: their stacks would mix. The kernel
    locks whatever stderr is (file, pipe or terminal) and unlocks it when a process ends. A rank whose turn doesn't come
    in time writes without one, because a stopped process could hold it for ever.
    """
    deadline = time.monotonic() + _TURN_SECONDS
    while True:
        try:
            fcntl.lockf(2, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.lockf(2, fcntl.LOCK_UN)


def start_watch(config: RunConfig) -> StallWatch:
    """Start this rank's watch, once all ranks have met."""
    known = hosts()
    return StallWatch(None, known.rank, len(known.ranks), config.training.stall_timeout, known.neighbors)


def is_silent(found: dict[str, Any]) -> bool:
    return found["silent"] > 0


def describe(rank: int, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"rank {rank}: has written nothing yet"
    silent = f", silent for {found['silent']:.0f} s" if is_silent(found) else ""
    return (
        f"rank {rank} on {found['host']}: step {found['step']}, {found['phase']} for {found['seconds']:.0f} s{silent}"
    )


def missing(ranks: list[dict[str, Any] | None]) -> list[str]:
    """Ranks that are silent, or behind the most advanced one."""
    furthest = max((found["step"] for found in ranks if found), default=0)
    names = []
    for rank, found in enumerate(ranks):
        if found is None or is_silent(found) or found["step"] < furthest or found["phase"] == "data":
            names.append(f"rank {rank}")
    return names
