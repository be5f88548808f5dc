"""A process group of one rank, for what talks to all ranks; another process that has claimed a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.train.ranks import agreement
from bagel_ds.train.ranks.hosts import Hosts
from tests.train.ranks.rank_info import rank_on


@pytest.fixture(scope="module")
def one_rank(process_group: None) -> None:
    """A process group of one rank whose faults `agreement` can compare."""
    agreement.enter(Hosts(0, (rank_on("here"),)))


REPOSITORY = Path(__file__).resolve().parents[2]

# Claims, forks a child that lives on as a DataLoader worker may, and waits for its input to end.
HOLDER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bagel_ds.train.saves.lock import claim
held = claim(Path(sys.argv[1]))
if os.fork() == 0:
    os.close(0), os.close(1)
    time.sleep(5)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
held.release()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), str(REPOSITORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
