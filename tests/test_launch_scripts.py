"""The scripts in launch/ have the guides' settings, pass on what is added, and end under Slurm as they say.

`deepspeed`, `srun`, `bagel-ds` and `scontrol` are scripts here that write down how they were called;
tests/distributed/test_launch_scripts.py trains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.cli.launch_line import launched_ranks
from bagel_ds.doctor.hosts import Host, read_hostfile
from tests.guide_commands import (
    BAGEL_MULTI_GPU,
    BAGEL_MULTI_NODE,
    BAGEL_SINGLE_GPU,
    BLOCKMOVING,
    arguments,
)

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
PATHS = {"DATASET_CONFIG": "d.yaml", "MODEL_PATH": "m", "RESULTS_DIR": "r"}


@pytest.fixture
def called(tmp_path: Path) -> Path:
    """A folder of programs that append their words to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "srun", "bagel-ds", "scontrol"):
        script = folder / name
        script.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> {tmp_path}/calls\n')
        script.chmod(0o755)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "HOSTFILE", "GPUS")}
    return {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **PATHS, **more}


def line_of(called: Path, script: str, *words: str, **variables: str) -> list[str]:
    """The words of the only program that a script starts."""
    command = ["bash", str(LAUNCH / script), *words]
    ran = subprocess.run(command, env=environment(called, **variables), cwd=called, timeout=60, check=False)
    assert ran.returncode == 0
    (line,) = (called / "calls").read_text().splitlines()
    return line.split()


def values(words: list[str]) -> dict[str, object]:
    return parse_arguments(words).values()


def differing(ours: list[str], guide: list[str]) -> set[str]:
    """Options whose values differ between the script's arguments and a guide's."""
    first, second = values(ours), values(["--ds_config", "zero3.json", *guide])
    return {name for name in first if first[name] != second[name]}


@pytest.mark.parametrize(
    ("guide", "variables", "ranks"),
    [(BAGEL_SINGLE_GPU, {"GPUS": "1"}, 1), (BAGEL_MULTI_GPU, {}, 4), (BAGEL_MULTI_NODE, {"HOSTFILE": "hosts"}, 16)],
)
def test_the_first_guides_settings(guide: str, variables: dict[str, str], ranks: int, called: Path) -> None:
    (called / "hosts").write_text((LAUNCH / "hostfile.example").read_text())
    words = line_of(called, "train_bagel.sh", "--ema_dtype", "bf16", **variables)
    script = words.index(str(LAUNCH / "train.py"))
    launched = launched_ranks([str(called / word) if word == "hosts" else word for word in words[:script]])
    assert launched is not None and launched.all == ranks
    assert differing(words[script + 1 :], arguments(guide)) == {
        "dataset_config_file",
        "model_path",
        "results_dir",
        "checkpoint_dir",
        "ema_dtype",
    }


def test_the_blockmoving_guides_settings(called: Path) -> None:
    words = line_of(called, "train_blockmoving.sh", "--lr", "5e-6")
    script = words.index(str(LAUNCH / "train.py"))
    assert words[:script] == "deepspeed --num_gpus 4 --master_port 29501".split()
    assert differing(words[script + 1 :], arguments(BLOCKMOVING)) == {
        "dataset_config_file",
        "model_path",
        "results_dir",
        "checkpoint_dir",
        "lr",
    }


def test_the_usual_paths_are_the_guides(called: Path) -> None:
    words = line_of(called, "train_bagel.sh", DATASET_CONFIG="", MODEL_PATH="", RESULTS_DIR="")
    found = values(words[words.index(str(LAUNCH / "train.py")) + 1 :])
    guide = values(["--ds_config", "zero3.json", *arguments(BAGEL_MULTI_GPU)])
    for name in ("model_path", "dataset_config_file", "results_dir", "checkpoint_dir"):
        assert Path(str(found[name])) == Path(str(guide[name]))


def test_the_example_hostfile_is_one() -> None:
    assert read_hostfile(LAUNCH / "hostfile.example") == [Host("node1", 8), Host("node2", 8)]


# ------------------------------------------------------------------------------------------------------------- Slurm
def slurm(called: Path, srun: str) -> subprocess.Popen[bytes]:
    (called / "bin" / "srun").write_text(f'#!/bin/bash\necho "srun $*" >> {called}/calls\n{srun}\n')
    variables = environment(called, SLURM_SUBMIT_DIR=str(LAUNCH.parent), SLURM_JOB_ID="77", CHECKPOINT_DIR="saved")
    return subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), "--lr", "1e-5"], env=variables, cwd=called)


def calls(called: Path) -> list[str]:
    return (called / "calls").read_text().splitlines() if (called / "calls").exists() else []


def test_a_slurm_job_trains_with_the_guides_settings_and_returns_the_code(called: Path) -> None:
    assert slurm(called, "exit 3").wait(60) == 3
    (line,) = calls(called)
    words = line.split()
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "python"]
    assert differing(words[words.index(str(LAUNCH / "train.py")) + 1 :], arguments(BAGEL_MULTI_GPU)) == {
        "dataset_config_file",
        "model_path",
        "results_dir",
        "checkpoint_dir",
        "num_workers",
        "resume_model_only",
        "lr",
    }


@pytest.mark.parametrize("complete", [False, True])
def test_a_slurm_job_that_is_warned_saves_waits_for_it_and_is_queued_again_unless_done(
    complete: bool, called: Path
) -> None:
    job = slurm(called, f"while [ ! -e {called}/asked ]; do sleep 0.05; done; sleep 1; echo saved >> {called}/calls")
    (called / "bin" / "bagel-ds").write_text(
        f'#!/bin/bash\necho "bagel-ds $*" >> {called}/calls; touch {called}/asked\n'
    )
    deadline = time.monotonic() + 60
    while not calls(called):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if complete:
        (called / "saved").mkdir()
        (called / "saved" / "step_final").touch()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert calls(called)[1:] == ["bagel-ds stop saved", "saved", *(["scontrol requeue 77"] * (not complete))]
