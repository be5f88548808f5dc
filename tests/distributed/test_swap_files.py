"""A rank that is killed takes its run's swap files with it: whoever outlives it removes them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.distributed.cases import arguments
from tests.distributed.started import StartedRun, send

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_killed_rank_leaves_nothing_on_nvme(demo: Path, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    words = arguments(demo, tmp_path, ds_config="zero3_nvme", nvme_path=nvme, total_steps=500, save_every=1000)
    with StartedRun(words, tmp_path) as run:
        run.until(lambda: (tmp_path / "metrics.jsonl").exists(), "a first step")
        assert list(nvme.rglob("rank0/*.swp")) and list(nvme.rglob("rank1/*.swp"))
        send(run.ranks()[:1], signal.SIGKILL)
        assert run.end() != 0
        run.all_ended()
    assert list(nvme.iterdir()) == []
