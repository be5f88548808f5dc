"""The scripts in launch/ train on the demo set: paths mapped, budgets scaled to its pictures, nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import losses
from tests.launch import REPOSITORY, cpu_environment, free_port, run_to_end

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BUDGETS = "--expected_num_tokens 512 --max_num_tokens 640 --max_num_tokens_per_sample 512".split()
BLOCKS = "--expected_num_tokens 1024 --max_num_tokens 1024 --max_num_tokens_per_sample 1024".split()
BLOCKS += "--prefer_buffer_before 1024".split()
# Two tasks of srun on this machine, with the variables that it sets.
SRUN = """#!/bin/bash
shift
codes=0
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 "$@" &
done
for job in $(jobs -p); do wait "$job" || codes=$?; done
exit $codes
"""


@pytest.mark.parametrize(
    ("script", "config", "words"),
    [("train_bagel.sh", "example.yaml", BUDGETS), ("train_blockmoving.sh", "blockmoving_sft.yaml", BLOCKS)],
)
def test_a_guides_script_trains(script: str, config: str, words: list[str], demo: Path, tmp_path: Path) -> None:
    port = free_port()
    paths = {"MODEL_PATH": str(demo / "model"), "DATASET_CONFIG": str(demo / config), "RESULTS_DIR": str(tmp_path)}
    environment = cpu_environment(**paths, GPUS="1", MASTER_PORT=str(port), LOG_EVERY="1")
    command = ["bash", str(REPOSITORY / "launch" / script), *words, "--total_steps", "2"]
    finished = run_to_end(command, environment, port, 600)
    assert finished.code == 0 and "done: 2 steps" in finished.output, finished.output[-4000:]
    assert (tmp_path / "checkpoints" / "step_final").exists() and len(losses(tmp_path)) == 2


def test_the_slurm_script_trains(demo: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "srun").chmod(0o755)
    port = free_port()
    paths = {"MODEL_PATH": str(demo / "model"), "DATASET_CONFIG": str(demo / "example.yaml")}
    environment = cpu_environment(
        **paths,
        RESULTS_DIR=str(tmp_path / "run"),
        SLURM_SUBMIT_DIR=str(REPOSITORY),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    words = [*BUDGETS, "--total_steps", "2", "--log_every", "1", "--num_worker", "1"]
    finished = run_to_end(["bash", str(REPOSITORY / "launch" / "slurm.sbatch"), *words], environment, port, 600)
    assert finished.code == 0 and "done: 2 steps" in finished.output, finished.output[-4000:]
    assert "2 rank(s), started by Slurm" in finished.output
    assert (tmp_path / "run" / "checkpoints" / "step_final").exists()
