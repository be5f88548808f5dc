"""Samples during training change nothing of it, and they are what `bagel-ds generate` makes of the checkpoint."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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

# Dealt to two ranks: one draws two pictures, the other answers, thinks and draws. (An image to read would first be
# enlarged to 512 pixels; tests/inference/test_joint_calls.py has one.)
PROMPTS: list[dict[str, object]] = [
    {"prompt": "a red square", "image_shapes": [64, 96], "num_timesteps": 4},
    {"prompt": "What is the color of the block?", "mode": "vqa", "max_think_token_n": 7},
    {"prompt": "a blue circle", "image_shapes": [48, 32], "num_timesteps": 3, "seed": 11},
    {"prompt": "a green ball", "image_shapes": [32, 32], "num_timesteps": 4, "think": True, "max_think_token_n": 4},
]
BAD = {
    "no_image": [PROMPTS[0], {"prompt": "make it blue", "image": "nowhere.png"}],
    "bad_line": [PROMPTS[0], {"prompt": "a cat", "cfg_text_scal": 2}],
    "taylor": [{"prompt": "a cat", "enable_taylorseer": True}],
}
SAYS = {
    "no_image": "no_image.jsonl line 2: image",
    "bad_line": "bad_line.jsonl line 2: cfg_text_scal is not a setting; did you mean cfg_text_scale?",
    "taylor": "taylor.jsonl line 1: enable_taylorseer",
}
STEPS, SAVED = 3, 2
DRAWN = ["000000", "000002", "000003"]


OTHERS = of_launches(  # preset and precision
    (("zero3_nvme_all", "fp32"), ("zero2", "bf16")),
    (
        *((preset, "fp32") for preset in ("zero0", "zero1", "zero2_cpu", "zero3_hpz")),
        *((preset, "bf16") for preset in ("zero0", "zero3_cpu_split_8bit")),
    ),
)


def write_prompts(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in {"prompts": PROMPTS, **BAD}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "prompts.jsonl"


def cases(demo: Path, folder: Path, preset: str, precision: str = "fp32") -> list[Case]:
    options = {"precision": precision, "total_steps": STEPS, "save_every": SAVED, "ds_config": preset}
    options |= {"nvme_path": folder / "nvme"} if "nvme" in preset else {}
    samples = {"sample_prompts": write_prompts(folder), "sample_every": 1, "sample_weights": "both"}
    runs = {"plain": {}, "sampled": samples}
    return [Case(name, arguments(demo, folder / name, **options, **own)) for name, own in runs.items()]  # type: ignore[arg-type]


def assert_training_is_the_same(folder: Path) -> None:
    assert losses(folder / "sampled") == losses(folder / "plain")
    for step in (SAVED, STEPS):
        assert checksums(folder / "sampled", step) == checksums(folder / "plain", step)


@pytest.fixture(scope="module")
def launched(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """With and without samples under ZeRO-3 with everything in host memory, and files of prompts that are wrong."""
    folder = tmp_path_factory.mktemp("sampling")
    every = cases(demo, folder, "zero3_cpu")
    every += [Case(name, arguments(demo, folder / name, sample_prompts=folder / f"{name}.jsonl")) for name in BAD]
    outcomes = run_cases(folder / "launch", every, ranks=2)
    for name in ("plain", "sampled"):
        assert [rank.code for rank in outcomes[name]] == [0, 0], outcomes[name][0].output
    return folder, outcomes


@pytest.fixture
def runs(launched: tuple[Path, dict[str, list[Outcome]]]) -> Path:
    return launched[0]


def test_training_is_the_same_with_and_without_samples(runs: Path) -> None:
    """Losses of every step, and masters, moments, average and weights after steps with samples of both kinds."""
    assert_training_is_the_same(runs)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_of_prompts_ends_all_ranks_before_anything_is_loaded(
    name: str, launched: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = launched
    assert [rank.code for rank in outcomes[name]] == [2, 2]
    output = outcomes[name][0].output
    assert SAYS[name] in " ".join(output.split()) and "Traceback" not in output and "loading" not in output
    assert not (folder / name / "metrics.jsonl").exists()


@pytest.mark.parametrize("source", ["model", "ema"])
def test_samples_are_what_the_command_makes_of_the_checkpoint(source: str, runs: Path, tmp_path: Path) -> None:
    """One process instead of two ranks, all prompts in one batch: sums of other sizes round differently."""
    assert_generated(runs, source, tmp_path, largest=1)


def assert_generated(runs: Path, source: str, out: Path, largest: int) -> None:
    checkpoint = runs / "sampled" / "checkpoints" / f"step_{SAVED}"
    words = ["--prompts", str(runs / "prompts.jsonl"), "--weights", source, "--device", "cpu"]
    assert main(["generate", "--model_path", str(checkpoint), "--out", str(out), *words]) == 0
    samples = runs / "sampled" / "samples" / f"step_{SAVED}" / source
    assert results(samples) == results(out)
    for name in DRAWN:
        drawn, generated = picture(samples / f"{name}.png"), picture(out / f"{name}.png")
        assert drawn.shape == generated.shape
        assert np.abs(drawn - generated).max() <= largest, name


def results(folder: Path) -> dict[str, str | None]:
    """Texts by name."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(rows) == len(PROMPTS)
    return {row["name"]: row["text"] for row in rows}


def picture(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_the_average_draws_other_pictures_than_the_weights(runs: Path) -> None:
    folder = runs / "sampled" / "samples" / f"step_{SAVED}"
    for name in DRAWN:
        other = picture(folder / "model" / f"{name}.png") - picture(folder / "ema" / f"{name}.png")
        assert np.abs(other).max() > 1, name


def test_samples_come_at_every_sample_every_steps_into_tensorboard_and_files(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "sampled" / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    names = [f"samples/{source}/{name}" for source in ("ema", "model") for name in DRAWN]
    assert sorted(events.Tags()["images"]) == names
    for name in names:
        images = events.Images(name)
        assert [image.step for image in images] == [0, 1, 2], "steps are counted from 0, as everywhere in TensorBoard"
        file = runs / "sampled" / "samples" / "step_3" / f"{name.removeprefix('samples/')}.png"
        assert (images[-1].height, images[-1].width) == picture(file).shape[:2]
    said = events.Tensors("samples/model/000001/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "What is the color of the block?" in said
    assert results(runs / "sampled" / "samples" / "step_3" / "model")["000001"] in " ".join(said.split("\n    "))
    assert not (runs / "plain" / "samples").exists()


def test_the_log_says_beforehand_how_many_calls_and_how_long(launched: tuple[Path, dict[str, list[Outcome]]]) -> None:
    output = launched[1]["sampled"][0].output
    calls = 2 * max(2 + 3, 3 + 7 + 3)  # reading, writing and drawing of each rank's batch
    assert f"samples of step 1 (model and ema): 4 prompts on 2 ranks, at most {calls} calls of the network" in output
    assert "a call of the network takes" in output
    assert f"samples of step 2 (model and ema): 4 prompts on 2 ranks, at most {calls} calls of the network, about" in (
        output
    )


@pytest.fixture(scope="module")
def others(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """With and without samples under each preset and precision."""

    @cache
    def launched(pairs: tuple[tuple[str, str], ...]) -> tuple[Path, dict[str, dict[str, list[Outcome]]]]:
        folder = tmp_path_factory.mktemp("others")
        sets = {"-".join(pair): cases(demo, folder / "-".join(pair), *pair) for pair in pairs}
        return folder, run_sets(folder / "launch", sets, ranks=2)

    return launched


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "preset", "precision"), OTHERS)
def test_training_and_samples_are_the_same_under_another_stage_or_offload(
    launch: Any, preset: str, precision: str, others: Launches, tmp_path: Path
) -> None:
    """In bf16 only the training: there the sizes of sums decide more than a picture's last digit."""
    folder, outcomes = others(launch)
    for name, ranks in outcomes[f"{preset}-{precision}"].items():
        assert [rank.code for rank in ranks] == [0, 0], f"{name}: {ranks[0].output}"
    results = folder / f"{preset}-{precision}"
    assert_training_is_the_same(results)
    for source in ("model", "ema") if precision == "fp32" else ():
        assert_generated(results, source, tmp_path / source, largest=1)
