"""Evaluation during training changes nothing of training, and its numbers are those of `bagel-ds evaluate`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.cli.main import main
from tests.distributed.cases import (
    Case,
    Launches,
    Outcome,
    arguments,
    checksums,
    losses,
    of_launches,
    run_cases,
    run_sets,
)

pytestmark = pytest.mark.distributed

VAL = """
interleave_reasoning:
  dataset_names: [blockmoving_test]
  image_transform_args: {image_stride: 16, max_image_size: 64, min_image_size: 32}
  vit_image_transform_args: {image_stride: 14, max_image_size: 56, min_image_size: 28}
  is_mandatory: true
  weight: 1
"""
BAD = {
    "unknown_dataset": VAL.replace("blockmoving_test", "blockmoving_tset"),
    "no_yaml": "interleave_reasoning: [",
    "all_too_long": VAL.replace("max_image_size: 64, min_image_size: 32", "max_image_size: 1024, min_image_size: 1024"),
}
STEPS = 3
PRESETS = of_launches((("zero0",), ("zero3_cpu",)), (("zero1",), ("zero2",)))


def val_config(demo: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "val.yaml"
    file.write_text(VAL)
    (folder / "dataset_info.yaml").write_text((demo / "dataset_info.yaml").read_text())
    (folder / "data").symlink_to(demo / "data")
    return file


def scores(results: Path) -> dict[int, dict[str, float]]:
    """By step, what metrics.jsonl holds of the held-out split."""
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: {name: value for name, value in line.items() if name.startswith("val/")} for line in lines}
    return {step: values for step, values in found.items() if values}


def cases(demo: Path, folder: Path, preset: str, packs: int) -> list[Case]:
    options = {"precision": "fp32", "max_num_tokens": 640, "total_steps": STEPS, "save_every": 2, "ds_config": preset}
    evaluated = {"val_config": val_config(demo, folder), "val_every": 1, "val_max_batches": packs}
    other_seeds = {**evaluated, "val_every": 2, "log_every": 100, "global_seed": 1, "data_seed": 2, "lr": 0}
    runs = {"plain": {}, "evaluated": evaluated, "other": other_seeds}
    return [Case(name, arguments(demo, folder / name, **options, **own)) for name, own in runs.items()]  # type: ignore[arg-type]


def assert_training_is_the_same(folder: Path) -> None:
    assert losses(folder / "evaluated") == losses(folder / "plain")
    assert checksums(folder / "evaluated", 2) == checksums(folder / "plain", 2)
    assert checksums(folder / "evaluated", STEPS) == checksums(folder / "plain", STEPS)
    assert scores(folder / "plain") == {}


@pytest.fixture(scope="module")
def launched(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """Runs on two ranks under ZeRO-3 on an odd number of packs, so that the last pack of rank 1 is empty."""
    folder = tmp_path_factory.mktemp("evaluation")
    every = cases(demo, folder, "zero3", 3)
    for name, text in BAD.items():
        (folder / f"{name}.yaml").write_text(text)
        every.append(Case(name, arguments(demo, folder / name, val_config=folder / f"{name}.yaml")))
    outcomes = run_cases(folder / "launch", every, ranks=2)
    for name in ("plain", "evaluated", "other"):
        assert [rank.code for rank in outcomes[name]] == [0, 0], outcomes[name][0].output
    return folder, outcomes


@pytest.fixture
def runs(launched: tuple[Path, dict[str, list[Outcome]]]) -> Path:
    return launched[0]


@pytest.mark.parametrize("name", BAD)
def test_a_fault_of_the_held_out_data_ends_all_ranks_before_the_first_step(
    name: str, launched: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = launched
    assert [rank.code for rank in outcomes[name]] == [2, 2]
    assert f"{name}.yaml" in outcomes[name][0].output and "Traceback" not in outcomes[name][0].output
    assert not (folder / name / "metrics.jsonl").exists()


def test_training_is_the_same_with_and_without_evaluation(runs: Path) -> None:
    assert_training_is_the_same(runs)


def test_scores_come_at_every_val_every_steps_and_at_the_last(runs: Path) -> None:
    assert list(scores(runs / "evaluated")) == [0, 1, 2]
    assert list(scores(runs / "other")) == [1, 2]
    names = set(scores(runs / "evaluated")[0])
    assert {"val/ce", "val/mse", "val/ce/blockmoving_test", "val/mse/blockmoving_test"} <= names
    assert any(name.startswith("val/mse_t/") for name in names)


def test_scores_depend_on_the_weights_only(runs: Path) -> None:
    """With learning rate 0, two evaluations agree to the last bit whatever the step; seeds are another run's."""
    evaluated, other = scores(runs / "evaluated"), scores(runs / "other")
    assert other[1] == other[2]
    assert evaluated[0] != evaluated[1] != evaluated[2]


def test_the_command_gives_the_scores_of_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one process instead of two ranks; of two checkpoints at once, weights and averages."""
    folders = [runs / "evaluated" / "checkpoints" / f"step_{step}" for step in (2, STEPS)]
    words = [*map(str, folders), "--val_config", str(runs / "val.yaml"), "--val_max_batches", "3", "--device", "cpu"]
    assert main(["evaluate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [(row["checkpoint"], row["weights"]) for row in found] == [
        (str(folder), kind) for folder in folders for kind in ("ema", "model")
    ]
    for row, step in zip(found[1::2], (1, 2), strict=True):
        assert row["scores"] == pytest.approx(scores(runs / "evaluated")[step], rel=1e-6)
    assert found[0]["scores"]["val/ce"] != found[1]["scores"]["val/ce"]


@pytest.fixture(scope="module")
def others(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """With and without evaluation under each preset."""

    @cache
    def launched(presets: tuple[tuple[str], ...]) -> tuple[Path, dict[str, dict[str, list[Outcome]]]]:
        folder = tmp_path_factory.mktemp("others")
        sets = {preset: cases(demo, folder / preset, preset, 3)[:2] for (preset,) in presets}
        return folder, run_sets(folder / "launch", sets, ranks=2)

    return launched


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "preset"), PRESETS)
def test_training_is_the_same_under_another_stage_or_offload(launch: Any, preset: str, others: Launches) -> None:
    folder, outcomes = others(launch)
    for name, ranks in outcomes[preset].items():
        assert [rank.code for rank in ranks] == [0, 0], f"{name}: {ranks[0].output}"
    assert_training_is_the_same(folder / preset)
