"""launch/demo.sh and demo_long.sh with stand-ins for `deepspeed`: whole runs are distributed tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.demo.devices import usable_gpus
from bagel_ds.errors import UserError

REPO = Path(__file__).resolve().parents[2]
FAKE_DEEPSPEED = """#!{python}
import json, os, pathlib, shutil, sys
pathlib.Path({record!r}).write_text("\\n".join(sys.argv[1:]))
results = pathlib.Path(sys.argv[sys.argv.index("--results_dir") + 1])
model = sys.argv[sys.argv.index("--model_path") + 1]
shutil.copytree(model, results / "checkpoints" / "step_60", dirs_exist_ok=True)
lines = [json.dumps({{"step": step, "loss/mse": 2 - step / 60, "loss/ce": 6 - step / 20}}) for step in range(60)]
(results / "metrics.jsonl").write_text("\\n".join(lines))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[str], Path]:
    """The script run twice with stand-ins on PATH; (what the second run printed, deepspeed's arguments, folder)."""
    folder = tmp_path_factory.mktemp("script")
    programs, record = folder / "bin", folder / "arguments.txt"
    programs.mkdir()
    scripts = {
        "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
        "bagel-ds": f'#!/bin/sh\nexec "{sys.executable}" -m bagel_ds.cli.main "$@"\n',
        "deepspeed": FAKE_DEEPSPEED.format(python=sys.executable, record=str(record)),
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(REPO / "launch" / "demo.sh"), "my demo", "--lr", "1e-3"]
    for number in range(2):
        if number:
            (folder / "my demo" / "results" / "precious").touch()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "my demo" / "results" / "precious").exists()
    return done, record.read_text().splitlines(), folder


def test_it_launches_two_ranks_with_zero3_and_arguments_that_the_trainer_knows(
    run: tuple[subprocess.CompletedProcess[str], list[str], Path],
) -> None:
    _, arguments, folder = run
    assert arguments[:2] == ["--num_gpus", "2"]
    assert Path(arguments[4]) == REPO / "launch" / "train.py"
    config = parse_arguments(arguments[5:])
    assert (config.training.ds_config, config.training.total_steps) == ("zero3.json", 60)
    assert config.training.start_anew, "the trainer moves an earlier demo's results aside"
    for path in (config.data.dataset_config_file, config.model.model_path):
        assert (folder / path).exists()


def test_further_arguments_reach_the_trainer_and_win(
    run: tuple[subprocess.CompletedProcess[str], list[str], Path],
) -> None:
    _, arguments, _ = run
    assert parse_arguments(arguments[5:]).training.lr == 1e-3


def test_it_ends_with_where_everything_is_and_how_the_losses_fell(
    run: tuple[subprocess.CompletedProcess[str], list[str], Path],
) -> None:
    done, _, _ = run
    tail = done.stdout.split("The demo run is done.")[1]
    for part in ("MSE", "CE", "tensorboard", "my demo/results/checkpoints/step_60"):
        assert part in tail


FAKE_LONG_DEEPSPEED = """#!/bin/sh
printf '%s\\n' "$@" > arguments.txt
checkpoints=out/results/checkpoints
mkdir -p $checkpoints
cp -r out/model $checkpoints/step_400
mv $checkpoints/step_400/ema.safetensors $checkpoints/step_400/model.safetensors
ln -s step_400 $checkpoints/step_final
"""


def test_the_long_demo_fails_where_training_did_not_learn_the_task(tmp_path: Path) -> None:
    """The stand-in does not train; everything else is the script's own."""
    scripts = {
        "python": f'exec "{sys.executable}" "$@"',
        "bagel-ds": f'exec "{sys.executable}" -m bagel_ds.cli.main "$@"',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "deepspeed").write_text(FAKE_LONG_DEEPSPEED)
    for name in (*scripts, "deepspeed"):
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(REPO / "launch" / "demo_long.sh"), "out", "--lr", "1e-3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "untrained, 0.0% trained; expected at least 80%" in done.stdout
    assert (tmp_path / "out" / "results" / "answers.png").is_file()
    arguments = (tmp_path / "arguments.txt").read_text().splitlines()
    config = parse_arguments(arguments[5:])
    assert (config.training.visual_gen, config.training.ema, config.training.lr) == (False, 0, 1e-3)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("5,6,7", "--include localhost:5,6"), ("3", "--include localhost:3"), (None, "--num_gpus 2")],
)
def test_on_gpus_it_trains_on_those_that_the_user_named(visible: str | None, expected: str, tmp_path: Path) -> None:
    """`deepspeed --num_gpus` would drop CUDA_VISIBLE_DEVICES."""
    gpus = 4 if visible is None else len(visible.split(","))
    scripts = {"python": f"echo {gpus}", "bagel-ds": "true", "deepspeed": f'echo "$@" > {tmp_path}/arguments'}
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("DS_ACCELERATOR", None)):
        environment.pop(name, None)
        environment |= {} if value is None else {name: value}
    subprocess.run(["bash", str(REPO / "launch" / "demo.sh")], cwd=tmp_path, env=environment, check=True)
    words = (tmp_path / "arguments").read_text()
    assert words.startswith(f"{expected} --master_port")


def test_asking_for_the_cpu_wins_over_any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert usable_gpus() == 0


def test_a_gpu_that_torch_cannot_use_is_an_error_not_a_cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("bagel_ds.doctor.environment.gpu_is_present", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch can't use it"):
        usable_gpus()
