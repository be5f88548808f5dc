"""A process group of one rank, for what talks to all ranks; another process that has claimed a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from bagel_ds.train.ranks import agreement
from bagel_ds.train.ranks.hosts import Hosts, RankInfo


def rank_on(host: str, **changed: object) -> RankInfo:
    """What a rank tells of itself: a process on `host`, with two cores and no GPU."""
    usual = RankInfo(host, f"kernel of {host}", "pid:[1]", 100, None, None, "10.0.0.1", (), (0, 1))
    return usual._replace(**changed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    agreement.enter(Hosts(0, (rank_on("here"),)))
    yield
    dist.destroy_process_group()


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
