"""A run that is asked to stop finishes its step, saves and ends; a resumed one continues exactly.

Each test does to a real launch what people and clusters do to theirs. Exit codes are asserted because
docs/reliability.md states them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import arguments, losses, soak
from tests.distributed.started import StartedRun, send, steps_logged
from tests.launch import REPOSITORY, TRAIN, run_ranks

pytestmark = pytest.mark.distributed

SLEEP = {"at": "step", "step": 2, "do": "sleep"}


def words_of(demo: Path, results: Path, **changed: object) -> list[str]:
    short = {"precision": "fp32", "max_num_tokens": 448, "save_every": 100, "total_steps": 100, "num_workers": 0}
    return arguments(demo, results, **{**short, "auto_resume": True, "stall_timeout": 120, **changed})


def saved_steps(results: Path) -> list[int]:
    folders = (results / "checkpoints").glob("step_*/trainer.json")
    return sorted(json.loads(path.read_text())["steps_done"] for path in folders if not path.parent.is_symlink())


def assert_saved_where_it_stopped(run: StartedRun) -> int:
    """The steps done, all of them in the newest checkpoint."""
    done = max(steps_logged(run.results)) + 1
    assert saved_steps(run.results)[-1] == done, run.output[-4000:]
    assert f"stopped: {done} steps" in run.output
    left = [path.name for path in (run.results / "checkpoints").iterdir() if path.name.startswith(".")]
    assert left == [], "nothing of the run but its checkpoints"
    return done


def test_a_signal_to_the_launcher_saves_the_step_under_way(demo: Path, tmp_path: Path) -> None:
    with StartedRun(words_of(demo, tmp_path, num_workers=1), tmp_path) as run:
        run.until_step(1)
        send([run.launcher()], signal.SIGTERM)
        assert run.end() == 1
        assert_saved_where_it_stopped(run)


@pytest.mark.soak
def test_signals_to_launcher_group_and_rank_save_and_the_run_goes_on_exactly(demo: Path, tmp_path: Path) -> None:
    """One run, stopped four times by other means, against an uninterrupted one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = words_of(demo, stopped, num_workers=1)
    with StartedRun(words, stopped) as run:  # an administrator's kill, or a node that shuts down
        run.until_step(1)
        send([run.launcher()], signal.SIGTERM)
        assert run.end() == 1
        done = assert_saved_where_it_stopped(run)
    with StartedRun(words, stopped) as run:  # Ctrl-C in a terminal
        run.until_step(done + 1)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.end() not in (0, 2)
        assert f"resumed after step {done}" in run.output
        done = assert_saved_where_it_stopped(run)
        traceback = run.output.index("\nKeyboardInterrupt\n")  # of the launcher, in one piece
        assert traceback < run.output.index("comes from the launcher, not from this run")
        assert traceback < run.output.index("stopping after")
    with StartedRun(words, stopped) as run:  # a cluster's warning to one process
        run.until_step(done + 1)
        send(run.ranks()[1:], signal.SIGUSR1)
        assert run.end() == 0
        done = assert_saved_where_it_stopped(run)
    with StartedRun(words, stopped) as run:
        run.until_step(done + 1)
        command = [sys.executable, "-m", "bagel_ds.cli.main", "stop", str(stopped)]
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout
        assert "saves and ends after its current step" in said
        assert run.end() == 0
        assert_saved_where_it_stopped(run)
        assert not (stopped / "stop").exists()
    total = max(steps_logged(stopped)) + 1
    finished = run_ranks(TRAIN, words_of(demo, whole, total_steps=total), ranks=2)
    assert finished.code == 0, finished.output[-4000:]
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["load", soak("index")])
def test_a_signal_before_training_ends_the_ranks_at_once(phase: str, demo: Path, tmp_path: Path) -> None:
    marker = tmp_path / "before"
    fault = {"at": phase, "do": "sleep", "seconds": 300, "marker": str(marker)}
    with StartedRun(words_of(demo, tmp_path / "run"), tmp_path / "run", faults=[fault]) as run:
        run.until(marker.exists, phase)
        began = time.monotonic()
        send([run.launcher()], signal.SIGTERM)
        assert run.end() == 1
        assert time.monotonic() - began < 60, "not the 300 s of the phase"
        assert "ended by SIGTERM; nothing was saved" in run.output
        assert saved_steps(run.results) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("launcher", signal.SIGTERM, 1),
        soak("launcher", signal.SIGUSR1, 0),
        soak("one rank", signal.SIGTERM, 0),
        soak("command", signal.SIGTERM, -signal.SIGTERM),
        ("group", signal.SIGINT, -signal.SIGINT),
    ],
)
def test_a_step_longer_than_the_launchers_patience_is_still_finished_and_saved(
    target: str, number: int, code: int, demo: Path, tmp_path: Path
) -> None:
    """The launcher dies of a signal at once (its command then ends with 0), or passes it on as SIGTERM to one rank
    after the other, each of which it kills 30 s later: what reaches the second is not a second signal after Ctrl-C.
    """
    marker = tmp_path / "inside"
    results = tmp_path / "run"
    fault = {**SLEEP, "seconds": 36, "marker": str(marker)}
    with StartedRun(words_of(demo, results, num_workers=1), results, faults=[fault]) as run:
        run.until(marker.exists, "the long step")
        if target == "group":
            os.killpg(run.process.pid, number)
        elif target == "one rank":
            send(run.ranks()[1:], number)
        else:
            send([run.launcher() if target == "launcher" else run.process.pid], number)
        assert run.process.wait(120) == code
        run.all_ended(120)
        assert assert_saved_where_it_stopped(run) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "saved"), [("data", [1]), ("save", [2, 3]), soak("export", [2, 3])])
def test_a_signal_while_data_are_awaited_or_saved_lets_that_finish(
    phase: str, saved: list[int], demo: Path, tmp_path: Path
) -> None:
    """What is saved in the end: the save under way, and that of the step after it."""
    marker, results = tmp_path / "inside", tmp_path / "run"
    fault = {"at": phase, "do": "sleep", "seconds": 8, "marker": str(marker)}
    with StartedRun(words_of(demo, results, save_every=2), results, faults=[fault]) as run:
        run.until(marker.exists, phase)
        send([run.launcher()], signal.SIGTERM)
        assert run.end() == 1
        assert saved_steps(results) == saved


@pytest.mark.slow
def test_signals_within_five_seconds_are_one_and_a_later_second_one_ends_at_once(demo: Path, tmp_path: Path) -> None:
    marker, results = tmp_path / "inside", tmp_path / "run"
    fault = {**SLEEP, "seconds": 300, "marker": str(marker)}
    with StartedRun(words_of(demo, results), results, faults=[fault]) as run:
        run.until(marker.exists, "the long step")
        for _ in range(3):
            send(run.ranks(), signal.SIGTERM)
            time.sleep(1)
        assert len(run.ranks()) == 2, "they go on to the end of the step"
        time.sleep(6)
        send(run.ranks(), signal.SIGTERM)
        assert run.end(60) != 0
        assert "second signal: stopping immediately" in run.output
        assert saved_steps(results) == []


@pytest.mark.slow
def test_a_time_limit_stops_and_saves(demo: Path, tmp_path: Path) -> None:
    with StartedRun(words_of(demo, tmp_path, stop_after="5s"), tmp_path) as run:
        assert run.end() == 0
        done = assert_saved_where_it_stopped(run)
        assert 1 <= done < 100


@pytest.mark.slow
def test_ranks_that_the_launcher_left_behind_save_and_end(demo: Path, tmp_path: Path) -> None:
    """SIGKILL only to the launcher: it can forward nothing, yet nothing may keep the GPUs."""
    with StartedRun(words_of(demo, tmp_path, num_workers=1), tmp_path) as run:
        run.until_step(1)
        send([run.launcher()], signal.SIGKILL)
        run.process.wait(60)
        run.all_ended(120)
        assert "the launcher is gone" in run.output
        assert_saved_where_it_stopped(run)


@pytest.mark.slow
def test_a_run_started_while_the_one_before_still_saves_waits_for_it(demo: Path, tmp_path: Path) -> None:
    marker, results = tmp_path / "inside", tmp_path / "run"
    faults: list[dict[str, Any]] = [{**SLEEP, "seconds": 300, "until": str(results / "go on"), "marker": str(marker)}]
    with StartedRun(words_of(demo, results), results, faults=faults) as first:
        first.until(marker.exists, "the long step")
        first.process.send_signal(signal.SIGTERM)
        first.process.wait(60)  # the command has ended; the ranks have not
        words = words_of(demo, tmp_path / "second", checkpoint_dir=results / "checkpoints", total_steps=4)
        with StartedRun(words, tmp_path / "second") as second:
            second.until(lambda: "is in use (process" in second.output, "waiting for the first run")
            (results / "go on").touch()
            assert second.end() == 0, second.output[-4000:]
            assert "resumed after step 3" in second.output
