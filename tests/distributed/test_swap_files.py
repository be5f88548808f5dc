"""Swap files: the survivors of a killed rank remove them, and a run that loses one stops with a message."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.distributed.cases import arguments
from tests.distributed.started import PATIENCE, StartedRun, send

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_killed_rank_is_named_and_leaves_nothing_on_nvme(demo: Path, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    words = arguments(demo, tmp_path, ds_config="zero3_nvme", nvme_path=nvme, total_steps=500, save_every=1000)
    with StartedRun(words, tmp_path) as run:
        run.until(lambda: (tmp_path / "metrics.jsonl").exists(), "a first step")
        assert list(nvme.rglob("rank0/*.swp")) and list(nvme.rglob("rank1/*.swp"))
        killed = run.ranks()[0]
        send([killed], signal.SIGKILL)
        assert run.end() != 0
        run.all_ended()
        assert f"[rank 1] rank 0 (process {killed}) has ended; ending this rank, too" in run.output
    assert list(nvme.iterdir()) == []


def test_a_run_that_loses_a_swap_file_stops_with_a_message(demo: Path, tmp_path: Path) -> None:
    """It would train on what its buffers held before. A file that is being written comes back, so all are removed until
    the run has ended."""
    nvme = tmp_path / "nvme"
    words = arguments(demo, tmp_path, ds_config="zero3_nvme", nvme_path=nvme, total_steps=500, save_every=1000)
    with StartedRun(words, tmp_path) as run:
        run.until(lambda: (tmp_path / "metrics.jsonl").exists(), "a first step")
        deadline = time.monotonic() + PATIENCE
        while run.process.poll() is None and time.monotonic() < deadline:
            for path in nvme.rglob("*.swp"):
                path.unlink(missing_ok=True)
            time.sleep(0.02)
        assert run.end() != 0
    assert "could not be read" in run.output and "--nvme_path" in run.output
    assert "resume from the last checkpoint" in run.output
