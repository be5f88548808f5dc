"""One run at a time in a checkpoint_dir: claims are waited for, end with their process, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train import claim as module
from bagel_ds.train.claim import FILE, claim

REPOSITORY = Path(__file__).resolve().parents[2]

# Claims, forks a child that lives on as a process that somebody forks may, and waits for its input to end.
HOLDER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bagel_ds.train.claim import claim
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


def test_a_claim_is_taken_and_leaves_nothing(tmp_path: Path) -> None:
    held = claim(tmp_path)
    assert held is not None and (tmp_path / FILE).exists()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_one_that_does_not_end_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid} on .*bagel-ds stop"):
        claim(tmp_path, patience=0.2)


@pytest.mark.parametrize("killed", [True, False])
def test_it_is_taken_over_once_the_other_ends(killed: bool, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    ending = threading.Timer(1.0, holder.kill if killed else holder.stdin.close)
    ending.start()
    began = time.monotonic()
    held = claim(tmp_path, patience=30)
    assert held is not None and time.monotonic() - began > 0.5
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "lockf", unsupported)
    assert claim(tmp_path) is None
