"""What a launch does when the workers of a rank can't go on, and when the start of a run hangs elsewhere.

What a worker's error says is shown in tests/data (test_loader.py, test_processes.py); here, that the whole job ends
with it, soon, and leaves nothing behind.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import arguments, soak
from tests.distributed.started import StartedRun
from tests.launch import TRAIN, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timed]

STALL = 15  # seconds, in which a phase of the start must go on on a busy machine


def words_of(demo: Path, results: Path, **changed: object) -> list[str]:
    return arguments(demo, results, **{"max_num_tokens": 448, "num_workers": 2, "stall_timeout": STALL, **changed})


def test_a_first_batch_that_never_comes_ends_the_job_with_the_stacks_of_its_worker(demo: Path, tmp_path: Path) -> None:
    faults = [{"at": "worker", "rank": 1, "do": "sleep", "seconds": 1000}]
    with StartedRun(words_of(demo, tmp_path), tmp_path, faults=faults) as run:
        assert run.end() != 0
    assert f"[rank 1] stalled: data of step 0 has taken longer than --stall_timeout {STALL} s" in run.output
    assert "missing: rank 1\n" in run.output
    assert re.search(r"\[rank 1\] asked for its stacks: data worker 0 \(process \d+\): it made a pack of ", run.output)
    assert "faulty_maker.py" in run.output and "in take" in run.output, "stacks of the worker and of the rank"


@pytest.mark.slow
def test_a_worker_that_is_killed_at_its_first_batch_ends_the_job(demo: Path, tmp_path: Path) -> None:
    faults = [{"at": "worker", "rank": 1, "do": "kill"}]
    with StartedRun(words_of(demo, tmp_path, stall_timeout=3600), tmp_path, faults=faults) as run:
        assert run.end() != 0
    assert "ERROR: data worker 0 (process" in run.output
    assert "was ended by SIGKILL (the kernel kills processes when memory runs out" in run.output
    assert "while it made a pack of " in run.output and "stalled" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize(("at", "rank", "phase"), [("load", 1, "load"), soak("index", 0, "setup")])
def test_a_start_that_hangs_ends_the_job(demo: Path, tmp_path: Path, at: str, rank: int, phase: str) -> None:
    faults: list[dict[str, Any]] = [{"at": at, "rank": rank, "do": "sleep", "seconds": 1000}]
    with StartedRun(words_of(demo, tmp_path), tmp_path, faults=faults) as run:
        assert run.end() != 0
    assert f"[rank {rank}] stalled: {phase} of step 0 has taken longer than --stall_timeout {STALL} s" in run.output
    assert "in _happen" in run.output, "its stacks"


@pytest.mark.slow
def test_a_tmpdir_of_137_characters_changes_nothing(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * (137 - len(str(tmp_path)) - 1))
    folder.mkdir()
    more = {"TMPDIR": str(folder)}
    finished = run_ranks(TRAIN, words_of(demo, tmp_path / "run", stall_timeout=120), ranks=2, env=more)
    assert finished.code == 0, finished.output[-4000:]
    assert "done: 1 steps" in finished.output
    assert not list(folder.glob("pymp-*"))
