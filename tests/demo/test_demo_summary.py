"""The last lines of `make demo`: what they say about a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bagel_ds.demo.summary import fall, last_checkpoint, main, read_metrics, summary

REPO = Path(__file__).resolve().parents[2]


def write_metrics(folder: Path, entries: list[dict[str, float | None]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_losses_checkpoint_and_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(
        tmp_path, [{"step": step, "loss/mse": 2.0 - step / 60, "loss/ce": 6.0 / (1 + step)} for step in range(60)]
    )
    for name in ("step_30", "step_60"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_60" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "step_60" / "ema.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "step_final").symlink_to("step_60")
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "60 steps logged" in shown and "MSE (generation)   1.9583 -> 1.0583 (-46%" in shown
    assert str(tmp_path / "tensorboard") in shown and "step_60" in shown
    assert "ema.safetensors, model.safetensors" in shown


def test_it_names_the_tensorboard_folder_that_the_readme_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_metrics(Path("demo/results"), [{"step": 0, "loss/ce": 1.0}])
    lines = summary(Path("demo/results"), Path("demo/results/checkpoints")).splitlines()
    (line,) = (line for line in lines if "TensorBoard" in line)
    command = line.split(maxsplit=1)[1]
    assert command == "tensorboard --logdir demo/results/tensorboard"
    assert f"`.venv/bin/{command}`" in (REPO / "README.md").read_text(encoding="utf-8")


def test_later_lines_supersede_and_missing_values_are_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "loss/ce": 9.0}, {"step": 1, "loss/ce": None}, {"step": 0, "loss/ce": 5.0}])
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics == [{"step": 0, "loss/ce": 5.0}, {"step": 1, "loss/ce": None}]
    assert fall(metrics, "loss/ce") is None
    assert fall(metrics, "loss/mse") is None


def test_the_last_checkpoint_is_the_numerically_last(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", "step_10.tmp", "other"):
        (tmp_path / name).mkdir()
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "step_10"
    assert last_checkpoint(tmp_path / "step_9") is None


def test_a_run_that_logged_nothing_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no logged step" in capsys.readouterr().err
