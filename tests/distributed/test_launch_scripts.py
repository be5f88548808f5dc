"""The scripts in launch/ train on the demo set: paths mapped, budgets scaled to its pictures, nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import losses
from tests.launch import REPOSITORY, cpu_environment, free_port, run_to_end

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BUDGETS = "--expected_num_tokens 512 --max_num_tokens 640 --max_num_tokens_per_sample 512".split()
# The BlockMoving config with the demo's sizes of images.
BLOCKS = """
interleave_reasoning:
  dataset_names: [blockmoving_train]
  image_transform_args: {image_stride: 16, max_image_size: 192, min_image_size: 48}
  vit_image_transform_args: {image_stride: 14, max_image_size: 196, min_image_size: 42}
  num_used_data: [1]
  weight: 1
"""
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


def train(script: str, config: Path, demo: Path, results: Path, *words: str) -> str:
    port = free_port()
    paths = {"MODEL_PATH": str(demo / "model"), "DATASET_CONFIG": str(config), "RESULTS_DIR": str(results)}
    environment = cpu_environment(**paths, GPUS="1", MASTER_PORT=str(port), LOG_EVERY="1")
    command = ["bash", str(REPOSITORY / "launch" / script), *BUDGETS, "--total_steps", "2", *words]
    finished = run_to_end(command, environment, port, 600)
    assert finished.code == 0 and "done: 2 steps" in finished.output, finished.output[-4000:]
    assert (results / "checkpoints" / "step_final").exists() and len(losses(results)) == 2
    return finished.output


def test_the_first_guides_script_trains(demo: Path, tmp_path: Path) -> None:
    train("train_bagel.sh", demo / "example.yaml", demo, tmp_path)


def test_the_blockmoving_guides_script_trains(demo: Path, tmp_path: Path) -> None:
    config = tmp_path / "blocks.yaml"
    config.write_text(BLOCKS)
    words = f"--prefer_buffer_before 512 --num_workers 1 --dataset_info {demo / 'dataset_info.yaml'}".split()
    said = train("train_blockmoving.sh", config, demo, tmp_path / "run", *words)
    assert "60 rows of blockmoving_train" in said


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
