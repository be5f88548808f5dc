"""The wheel works without the repository: installed into a new environment, it trains from an empty folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.distributed.cases import losses
from tests.launch import REPOSITORY, cpu_environment, free_port, run_to_end

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The shortest run that still reads every kind of data, reduces over ranks and saves.
TRAINING = """
  --ds_config zero3_cpu --dataset_config_file demo/example.yaml --model_path demo/model --finetune_from_hf True
  --results_dir results --checkpoint_dir results/checkpoints --total_steps 1 --log_every 1 --num_workers 0
  --expected_num_tokens 448 --max_num_tokens 448 --max_num_tokens_per_sample 448
""".split()


def build(folder: Path) -> Path:
    """The wheel of this checkout. hatchling comes with the extra `test`, so nothing is downloaded."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    ran = subprocess.run([*pip, str(REPOSITORY)], capture_output=True, text=True, cwd=folder, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the wheel; its other packages are those of the one that tests run in.

    A .pth file adds these. Paths that .pth files there name, such as this repository's, are not followed.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout=300, check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    ran = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return python


def test_an_installed_wheel_makes_a_demo_and_trains_on_two_ranks_from_an_empty_folder(tmp_path: Path) -> None:
    for name in ("wheel", "empty"):
        (tmp_path / name).mkdir()
    wheel, empty = build(tmp_path / "wheel"), tmp_path / "empty"
    held = set(zipfile.ZipFile(wheel).namelist())
    files = subprocess.run(
        ["git", "ls-files", "bagel_ds", "ds_configs"], cwd=REPOSITORY, capture_output=True, text=True
    )
    tracked = {name.replace("ds_configs/", "bagel_ds/ds_configs/") for name in files.stdout.split()}
    assert len(tracked) > 100 and tracked <= held

    python = install(wheel, tmp_path / "venv")
    environment = cpu_environment(PYTHONPATH="", PATH=f"{python.parent}:{cpu_environment()['PATH']}")

    def run(*words: str, timeout: float = 300) -> str:
        port = free_port()
        command = [word.replace("PORT", str(port)) for word in words]
        finished = run_to_end(command, environment, port, timeout, cwd=empty)
        assert finished.code == 0, finished.output[-4000:]
        return finished.output

    place = run(str(python), "-c", "import bagel_ds; print(bagel_ds.__file__)")
    assert place.startswith(str(tmp_path / "venv"))
    run("bagel-ds", "demo", "--out", "demo")
    launcher = [str(python), "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT"]
    output = run(*launcher, "--module", "bagel_ds.train", *TRAINING, timeout=900)
    assert "done: 1 steps" in output and "2 rank(s), ZeRO stage 3" in output
    assert list(losses(empty / "results")) == [0]
    assert (empty / "results" / "checkpoints" / "step_1" / "model.safetensors").is_file()
