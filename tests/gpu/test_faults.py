"""What goes wrong on a GPU ends as docs/reliability.md says: reported once, with its exit code, no hang.

Every test is a launch of its own, since ranks and launcher end in it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bagel_ds.checkpoint.step_folders import TRAINER, newest_state
from bagel_ds.data.batches.batch_file import load_batch
from tests.distributed.started import StartedRun, send, steps_logged
from tests.gpu.launches import RANKS, REHEARSED, started, words_of
from tests.launch import REPOSITORY

LAST = RANKS - 1  # the rank that meets the fault


def saved_step(run: StartedRun) -> int:
    """The steps done, all of them in the newest checkpoint."""
    done = max(steps_logged(run.results)) + 1
    assert f"stopped: {done} steps" in run.output, run.output[-4000:]
    newest = newest_state(run.results / "checkpoints")
    assert newest is not None and json.loads((newest / TRAINER).read_text())["steps_done"] == done
    return done


def test_a_stopped_run_is_saved_and_goes_on_where_it_was(demo: Path, tmp_path: Path) -> None:
    """By a signal to the launcher, then by `bagel-ds stop`."""
    words = words_of(demo, tmp_path, total_steps=500, num_workers=1, auto_resume=True, stall_timeout=120)
    with started(words, tmp_path) as run:
        run.until_step(1)
        send([run.launcher()], signal.SIGTERM)
        assert run.end() == 1
        done = saved_step(run)
    with started(words, tmp_path) as run:
        run.until_step(done + 1)
        command = [sys.executable, "-m", "bagel_ds.cli.main", "stop", str(tmp_path)]
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, timeout=120)
        assert run.end() == 0
        assert f"resumed after step {done}" in run.output
        assert saved_step(run) > done + 1
    assert steps_logged(tmp_path) == list(range(max(steps_logged(tmp_path)) + 1)), "no step twice, none left out"


def test_a_rank_out_of_memory_tells_its_pack_once_and_the_job_ends(demo: Path, tmp_path: Path) -> None:
    """On a GPU torch itself runs out, since the rank may take nothing more; the others wait for it in NCCL."""
    faults = [{"at": "step", "rank": LAST, "step": 1, "do": "oom" if REHEARSED else "cap"}]
    with started(words_of(demo, tmp_path, total_steps=100), tmp_path, faults) as run:
        code = run.end()
        assert code == 2 if RANKS == 1 else code in (1, 2), "2 where the launcher sees that rank first"
    assert run.output.count("out of GPU memory: CUDA out of memory") == 1, run.output[-4000:]
    assert "The longest pack of this rank had" in run.output and "--max_num_tokens (now 448)" in run.output
    assert max(steps_logged(tmp_path)) == 0


def test_an_update_that_is_not_finite_is_skipped_and_its_packs_are_kept(demo: Path, tmp_path: Path) -> None:
    faults = [{"at": "step", "rank": LAST, "step": 1, "do": "nan"}]
    words = words_of(demo, tmp_path, total_steps=3, save_every=1, max_nonfinite=1)
    with started(words, tmp_path, faults) as run:
        assert run.end() == 0, run.output[-4000:]
    assert "step 1 skipped" in run.output and "1 of --max_nonfinite 1" in run.output
    first, skipped, updated = (tmp_path / "checkpoints" / f"step_{step}" for step in (1, 2, 3))
    states = [f"state/rank_{rank:05d}.safetensors" for rank in range(RANKS)]
    for file in ("model.safetensors", "ema.safetensors", *states):
        one, other, third = (load_file(folder / file) for folder in (first, skipped, updated))
        assert all(one[name].equal(other[name]) for name in one), "nothing was updated"
        assert not all(one[name].equal(third[name]) for name in one), "training went on"
    batch = load_batch(tmp_path / "nonfinite" / f"step_1_rank_{LAST}_pack_0")
    assert batch.noise.isnan().any() and batch.samples


def test_a_step_that_stalls_ends_the_job_with_the_stacks_of_all_ranks(demo: Path, tmp_path: Path) -> None:
    """The others wait for that rank inside NCCL, which would go on for half an hour."""
    faults: list[dict[str, Any]] = [{"at": "step", "rank": LAST, "step": 2, "do": "sleep", "seconds": 400}]
    with started(words_of(demo, tmp_path, total_steps=100, stall_timeout=10), tmp_path, faults) as run:
        assert run.end(300) == 1
    for rank in range(RANKS):
        assert f"[rank {rank}] stalled: step of step 2 has taken longer than --stall_timeout 10 s" in run.output
    assert run.output.count("most recent call first") >= 2, "stacks, of more than one thread"


def test_a_killed_rank_takes_the_others_and_all_workers_with_it(demo: Path, tmp_path: Path) -> None:
    with started(words_of(demo, tmp_path, total_steps=500, num_workers=1), tmp_path) as run:
        run.until_step(1)
        assert len(run.ranks()) == RANKS and run.workers()
        send([run.ranks()[LAST]], signal.SIGKILL)
        assert run.end() not in (0, 2), "and nothing of the run is left"


@pytest.mark.parametrize("preset", ["zero3_nvme", "zero3_nvme_all"])
def test_a_killed_rank_leaves_no_swap_files(preset: str, demo: Path, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    words = words_of(demo, tmp_path, ds_config=preset, nvme_path=nvme, total_steps=500)
    with started(words, tmp_path) as run:
        run.until_step(1)
        assert [path for path in nvme.rglob("*") if path.is_file()]
        send([run.ranks()[LAST]], signal.SIGKILL)
        run.end()
    assert not [path for path in nvme.rglob("*") if path.is_file()], "removed by the last process to end"
