"""`bagel-ds evaluate`: the table, and mistakes that are reported before anything is loaded."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from bagel_ds.cli.evaluate import Row, table
from bagel_ds.cli.main import main
from bagel_ds.demo import write_demo
from bagel_ds.demo.one_move import write_one_move


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder, seed=0)
    return folder


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_the_table_has_a_column_for_every_score_of_any_row() -> None:
    rows = [Row("step_10", "ema", {"val/ce": 1.5, "val/mse": 0.25}), Row("step_9", "model", {"val/mse": 0.125})]
    assert table(rows) == [
        "checkpoint  weights  ce      mse",
        "step_10     ema      1.5000  0.2500",
        "step_9      model    -       0.1250",
    ]


def test_mistakes_are_reported_together_before_anything_is_loaded(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    text = error(capsys, tmp_path / "absent", tmp_path / "empty", "--val_config", demo / "example.yaml")
    assert "absent: no such folder" in text and "empty lacks ema.safetensors and model.safetensors" in text
    (tmp_path / "latest").write_text("step_3")  # as on file systems without links
    assert f"{tmp_path / 'step_3'}: no such folder" in error(
        capsys, tmp_path / "latest", "--val_config", demo / "example.yaml"
    )
    text = error(capsys, demo / "model", "--val_config", "nowhere.yaml")
    assert "--val_config nowhere.yaml: no such file" in text and "--dataset_config_file" not in text
    assert "--val_every" in error(capsys, demo / "model", "--val_config", demo / "example.yaml", "--val_evry", 3)


def test_settings_come_from_the_run_and_then_from_the_command(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "step_7"
    shutil.copytree(demo / "model", folder)
    words = [folder, "--val_config", demo / "example.yaml", "--val_max_batches", 2, "--device", "cpu", "--json"]

    def scores(*more: object) -> dict[str, float]:
        capsys.readouterr()
        assert main(["evaluate", *map(str, [*words, *more])]) == 0
        (row,) = json.loads(capsys.readouterr().out)["results"]
        return dict(row["scores"])

    given = scores("--max_num_tokens", 700, "--timestep_shift", 3, "--precision", "fp32")
    recorded = {"arguments": {"max_num_tokens": 700, "timestep_shift": 3.0, "precision": "fp32", "ema": 0.9}}
    (folder / "trainer.json").write_text(json.dumps({**recorded, "steps_done": 7}))
    assert scores() == given
    assert scores("--timestep_shift", 1) != given
    (folder / "trainer.json").write_text("{")
    assert "trainer.json can't be read" in error(capsys, *words)


def test_a_metric_of_the_users_gets_a_column(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = demo / "val.yaml"
    config.write_text(
        "vlm_sft: {dataset_names: [llava_ov], num_used_data: [3], weight: 1, "
        "image_transform_args: {image_stride: 14, max_image_size: 56, min_image_size: 28}}"
    )
    words = [demo / "model", "--val_config", config, "--device", "cpu"]
    (demo / "length.py").write_text("def length(prediction, row):\n    return len(prediction.text)\n")
    assert "no such file" in error(capsys, *words, "--metric", "nowhere.py:f")
    assert "pass --metric, too" in error(capsys, *words, "--num_timesteps", 3)
    metric = ["--metric", f"{demo / 'length.py'}:length", "--max_think_token_n", 4, "--weights", "ema"]
    assert main(["evaluate", *map(str, [*words, *metric])]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "length" and float(line.split()[-1]) > 0


def test_runs_without_the_generation_side_score_the_same(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their checkpoints still hold its weights, which the network then doesn't have; the run's precision is bf16."""
    data = write_one_move(tmp_path, random.Random(0), train_rows=4, test_rows=8)
    words = [demo / "model", "--val_config", data / "test.yaml", "--device", "cpu", "--json", "--max_think_token_n", 2]
    found = []
    for generates in (True, False):
        capsys.readouterr()
        more = ["--visual_gen", generates, "--metric", f"{demo / 'exact_answer.py'}:exact_answer"]
        assert main(["evaluate", *map(str, [*words, *more])]) == 0
        found.append(json.loads(capsys.readouterr().out)["results"][0]["scores"])
    assert found[0] == found[1] and {"val/ce", "val/exact_answer"} <= set(found[0])
