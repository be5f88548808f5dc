"""launch/train.py that takes a host for dead after eight seconds of silence instead of two minutes.

Ranks on several hosts gather what they save only when the next update waits for it. With BAGEL_TEST_HOST the host of
this rank seems to have that name and a kernel of its own.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bagel_ds.train.main import read_arguments, run_rank
from bagel_ds.train.process.detach import run_detached
from bagel_ds.train.ranks.launcher import Started, started


def main() -> int:
    by = started()
    return run_detached(lambda: _run(by), by.reports)


def _run(by: Started) -> int:
    from bagel_ds.train.ranks import alarm, hosts

    if "BAGEL_TEST_HOST" in os.environ:
        socket.gethostname = lambda: os.environ["BAGEL_TEST_HOST"]
        hosts._BOOT_ID = Path("/proc/sys/kernel/random/uuid")  # another id each time
    _gather_late()
    alarm._SILENT_SECONDS, alarm._BEAT_SECONDS = 8.0, 1.0
    return run_rank(read_arguments(), by)


def _gather_late() -> None:
    from bagel_ds.checkpoint.gather import Gathering
    from bagel_ds.train.saves.background import Background

    collect, ended_within, waited_for = Gathering.collect, Background.ended_within, threading.Event()

    def late(self: Any, *arguments: Any) -> None:
        assert waited_for.wait(300)
        print("gathering while the next update waits", flush=True)
        collect(self, *arguments)
        waited_for.clear()

    def telling(self: Any, seconds: float) -> bool:
        waited_for.set()
        return ended_within(self, seconds)

    Gathering.collect, Background.ended_within = late, telling  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
