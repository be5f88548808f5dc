"""A run that is killed in any phase and started again ends with exactly the losses of an uninterrupted one.

BAGEL_KILLS is the number of kills (default 3; `make soak` takes 100), BAGEL_KILL_SEED chooses them. By default the run
has split masters with rounded moments and average, which nothing but an exact state could continue; `make soak` also
kills one with fp32 states. A kill is a phase (so long after a step was logged, inside a save, inside the export of
weights, while the data are indexed, while the run is loading) and a victim (one rank, one waiting process, all ranks,
only the launcher, the whole launch, launch and ranks).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from bagel_ds.checkpoint.step_folders import checksum_fault, manifest_fault, newest_state, state_files, step_folders
from bagel_ds.data.index.cache import BESIDE_DATA
from tests.distributed.cases import arguments, losses, soak
from tests.distributed.started import StartedRun, send, steps_logged
from tests.launch import TRAIN, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 12
PHASES = ("step", "step", "save", "export", "index", "load")
VICTIMS = ("rank", "waiting", "ranks", "launcher", "launch", "all")


class Kill(NamedTuple):
    phase: str
    victim: str
    rank: int
    step: int  # further steps before it, for moments that need training
    delay: float  # seconds

    @classmethod
    def drawn(cls, number: int, seed: int) -> Kill:
        """The kill of that number; the first ones between them show every phase and every victim."""
        draw = random.Random(f"{seed}/{number}")
        phase, victim = PHASES[number % len(PHASES)], VICTIMS[number % len(VICTIMS)]
        if number >= max(len(PHASES), len(VICTIMS)):
            phase, victim = draw.choice(PHASES), draw.choice(VICTIMS)
        return cls(phase, victim, draw.randrange(2), draw.randrange(4), draw.random() * 1.5)


SPLIT = {"ds_config": "zero3_cpu_split_8bit", "precision": "bf16", "ema_dtype": "bf16"}
FP32 = {"ds_config": "zero3", "precision": "fp32"}


def words_of(demo: Path, results: Path, states: dict[str, str]) -> list[str]:
    short = {"max_num_tokens": 448, "total_steps": STEPS, "save_every": 2, "keep_last": 3, **states}
    return arguments(demo, results, **short, num_workers=1, auto_resume=True, stall_timeout=120)


@pytest.mark.parametrize("states", [pytest.param(SPLIT, id="split"), soak(FP32)])
def test_losses_of_a_run_killed_again_and_again_are_those_of_one_left_alone(
    states: dict[str, str], demo: Path, tmp_path: Path
) -> None:
    kills, seed = int(os.environ.get("BAGEL_KILLS", "3")), int(os.environ.get("BAGEL_KILL_SEED", "0"))
    finished = run_ranks(TRAIN, words_of(demo, tmp_path / "whole", states), ranks=2)
    assert finished.code == 0, finished.output[-4000:]
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(STEPS))

    done, attempt = 0, 0
    seen: Counter[tuple[str, str]] = Counter()
    while done < kills:
        results = tmp_path / f"killed_{attempt}"
        while done < kills:
            kill = Kill.drawn(done, seed)
            print(f"kill {done}: {kill}", flush=True)
            if not _lives_until(kill, demo, results, states):
                break  # the run was over before it; the kill waits for the next one
            _assert_nothing_is_lost(results)
            seen[kill.phase, kill.victim] += 1
            done += 1
        finished = run_ranks(TRAIN, words_of(demo, results, states), ranks=2)
        assert finished.code == 0, finished.output[-4000:]
        assert losses(results) == expected, f"seed {seed}, before kill {done}"
        left = {path.name for path in (results / "checkpoints").iterdir()}
        assert {"latest", "step_12", "step_final"} < left and len(left) == 5, left
        shutil.rmtree(results)
        attempt += 1
    print(f"{done} kills: {dict(seen)}")


def _lives_until(kill: Kill, demo: Path, results: Path, states: dict[str, str]) -> bool:
    """Start or resume the run and kill it; False where it ended by itself first."""
    if kill.phase == "index":
        for folder in demo.rglob(BESIDE_DATA):
            shutil.rmtree(folder)
    checkpoints = results / "checkpoints"
    newest = newest_state(checkpoints) if checkpoints.is_dir() else None
    begun = 0 if newest is None else int(newest.name.removeprefix("step_"))
    if begun + kill.step >= STEPS:
        return False
    with StartedRun(words_of(demo, results, states), results) as run:
        run.until(lambda: len(run.ranks()) == 2, "two ranks")
        _await_moment(run, kill, demo, checkpoints, begun)
        if not _strike(run, kill):
            return False
        code = run.process.wait(120)
        run.all_ended(60)
        # DeepSpeed's command ends with 0 when its per-host launcher is killed; the ranks have saved then.
        assert code != 0 or kill.victim == "launcher", f"{kill} has gone unnoticed"
    return True


def _await_moment(run: StartedRun, kill: Kill, demo: Path, checkpoints: Path, begun: int) -> None:
    if kill.phase == "index":
        run.until(lambda: any(demo.rglob(f"{BESIDE_DATA}/.lock*")), "an index being made")
        time.sleep(kill.delay / 10)
    elif kill.phase == "load":
        time.sleep(kill.delay * 8)
    elif kill.phase == "step":
        run.until_step(begun + kill.step)
        time.sleep(kill.delay)
    else:
        name = "model.safetensors" if kill.phase == "export" else "state"
        run.until(lambda: any(checkpoints.glob(f".unfinished-*/{name}")), f"a save with its {name}")
        time.sleep(kill.delay / 10)


def _strike(run: StartedRun, kill: Kill) -> bool:
    """False where the victim has ended already."""
    if kill.victim in ("launch", "all"):
        waiting = run.waiting()
        if kill.victim == "all":  # so that nobody is left to end workers: the kernel does
            send(run.ranks(), signal.SIGKILL)
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
        return bool(waiting)
    if kill.victim == "launcher":
        try:
            victims = [run.launcher()]
        except StopIteration:
            return False
    else:
        victims = run.waiting() if kill.victim == "waiting" else run.ranks()
        if kill.victim != "ranks":
            victims = victims[kill.rank : kill.rank + 1]
    send(victims, signal.SIGKILL)
    return bool(victims) and "done: 12 steps" not in run.output


def _assert_nothing_is_lost(results: Path) -> None:
    """Every checkpoint that has a final name is whole, to the last byte, and the newest is at most two steps old."""
    checkpoints = results / "checkpoints"
    if not checkpoints.is_dir():
        return
    for _, folder in step_folders(checkpoints):
        assert manifest_fault(folder) is None and checksum_fault(folder, state_files(folder)) is None, folder
    logged = max(steps_logged(results), default=-1) + 1
    newest = newest_state(checkpoints)
    done = 0 if newest is None else json.loads((newest / "trainer.json").read_text())["steps_done"]
    assert logged - done <= 2, "no more is lost than what was done since the last save"
