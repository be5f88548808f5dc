"""launch/train.py that takes a host for dead after eight seconds of silence instead of two minutes."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bagel_ds.train.main import read_arguments, run_rank
from bagel_ds.train.process.detach import run_detached
from bagel_ds.train.ranks.launcher import Started, started


def main() -> int:
    by = started()
    return run_detached(lambda: _run(by), by.reports)


def _run(by: Started) -> int:
    from bagel_ds.train.ranks import alarm

    if "BAGEL_TEST_HOST" in os.environ:  # the host of this rank seems to have that name
        socket.gethostname = lambda: os.environ["BAGEL_TEST_HOST"]
    alarm._SILENT_SECONDS, alarm._BEAT_SECONDS = 8.0, 1.0
    return run_rank(read_arguments(), by)


if __name__ == "__main__":
    sys.exit(main())
