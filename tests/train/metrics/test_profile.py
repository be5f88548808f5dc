"""A profile is of the steps after the first ones, names the parts of a step, and says when there was none."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from bagel_ds.train.metrics.profile import PHASES, SKIPPED, StepProfile, phase_of_step


def run(folder: Path, profiled: int, steps: int) -> None:
    profile = StepProfile(folder, profiled)
    for step in range(steps):
        for name in PHASES:
            with phase_of_step(name):
                torch.ones(800, 800) @ torch.ones(800, 800)
        profile.step(step)
    profile.close()


def test_so_many_steps_after_the_first_ones_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bagel_ds"):
        run(tmp_path / "profile", 2, SKIPPED + 4)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [names.count(name) for name in PHASES] == [2] * len(PHASES)
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert table.startswith("2 steps of rank 0") and "aten::mm" in table
    rows = {line[:20].strip(): float(line[20:]) for line in table.splitlines()[2 : 3 + len(PHASES)]}
    assert set(rows) == {*PHASES, "together"} and all(rows[name] > 0 for name in PHASES)
    assert rows["together"] == pytest.approx(sum(rows[name] for name in PHASES), abs=0.1 * len(PHASES))
    assert any("table.txt" in message for message in caplog.messages)
    assert not StepProfile.active


@pytest.mark.parametrize("steps", [0, SKIPPED, SKIPPED + 1])
def test_a_run_that_is_too_short_says_so(tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        run(tmp_path / "profile", 2, steps)
    assert any("nothing was written" in message and f"{SKIPPED + 2} steps" in message for message in caplog.messages)
    assert not (tmp_path / "profile").exists()


def test_exactly_enough_steps_are_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "profile", 1, SKIPPED + 1)
    assert (tmp_path / "profile" / "trace.json.gz").is_file() and not caplog.messages
