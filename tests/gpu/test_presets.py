"""Every preset trains on the GPUs of this host, in bf16 and fp32: one launch for all, each compared with zero3.

Guarantees: losses and gradient norms are those of zero3 in the same precision, with every --activation_checkpointing;
memory and MFU are logged; the memory that torch reserves stays within the plan; swap files are removed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bagel_ds.memory.planner import CUDA_CONTEXT
from bagel_ds.train.metrics.throughput import peak_tflops
from bagel_ds.units import GIB
from tests.distributed.cases import Case, Outcome, losses
from tests.gpu.launches import (
    BF16,
    FP32,
    GPUS,
    ON_GPU,
    REHEARSED,
    assert_done,
    metrics,
    needs_gpus,
    only_on_a_gpu,
    run_cases,
    words_of,
)
from tests.launch import REPOSITORY, TRAIN, deepspeed

PRESETS = sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json"))
BF16_ONLY = {"zero3_split", "zero3_cpu_split", "zero3_cpu_split_bf16", "zero3_cpu_split_8bit"}
RUNS = [(preset, precision) for preset in PRESETS for precision in ("bf16", "fp32")]
RUNS = [(preset, precision) for preset, precision in RUNS if precision == "bf16" or preset not in BF16_ONLY]
MODES = ("none", "offload")  # beside the default, "full"
STEPS = 3
PLANNED = re.compile(r"GPU ([\d.]+) GiB reserved by torch, ([\d.]+) planned")

Trained = tuple[Path, dict[str, list[Outcome]]]


@pytest.fixture(scope="module")
def trained(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each run's results lie in a folder of its name."""
    folder = tmp_path_factory.mktemp("presets")

    def case(name: str, preset: str, precision: str, **changed: object) -> Case:
        results = folder / name
        options = {"precision": precision, "total_steps": STEPS, "num_workers": 1, "nvme_path": results / "nvme"}
        return Case(name, words_of(demo, results, ds_config=preset, **options, **changed))

    several = [case(f"{preset}-{precision}", preset, precision) for preset, precision in RUNS]
    several += [case(mode, "zero3", "fp32", activation_checkpointing=mode) for mode in MODES]
    return folder, run_cases(folder / "launch", several)


@pytest.mark.parametrize(("preset", "precision"), RUNS)
def test_a_preset_trains_as_zero3_does(preset: str, precision: str, trained: Trained) -> None:
    folder, outcomes = trained
    name = f"{preset}-{precision}"
    assert_done(outcomes[name])
    expected, found = losses(folder / f"zero3-{precision}"), losses(folder / name)
    assert list(found) == list(range(STEPS))
    tolerance = FP32 if precision == "fp32" else BF16
    for step, (mse, ce, norm) in found.items():
        assert (mse, ce) == pytest.approx(expected[step][:2], rel=tolerance), step
        assert norm == pytest.approx(expected[step][2], rel=3 * tolerance), step
    assert (folder / name / "checkpoints" / "step_final" / "ema.safetensors").exists()
    nvme = folder / name / "nvme"
    assert not nvme.exists() or not [path for path in nvme.rglob("*") if path.is_file()], "swap files are removed"


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_no_loss(mode: str, trained: Trained) -> None:
    folder, outcomes = trained
    assert_done(outcomes[mode])
    expected = losses(folder / "zero3-fp32")
    for step, found in losses(folder / mode).items():
        assert found == pytest.approx(expected[step], rel=FP32), step


@pytest.mark.parametrize(("preset", "precision"), RUNS)
def test_memory_and_utilization_are_logged_and_memory_stays_within_the_plan(
    preset: str, precision: str, trained: Trained
) -> None:
    folder, outcomes = trained
    name = f"{preset}-{precision}"
    assert_done(outcomes[name])
    for line in metrics(folder / name):
        assert line["memory/host_gib"] > 0 and line["perf/tokens_per_sec"] > 0
        if REHEARSED:
            assert not [key for key in line if key.startswith("memory/device")], "there is none"
            continue
        assert line["memory/device_reserved_gib"] >= line["memory/device_gib"] > 0
        assert ("perf/mfu" in line) == (peak_tflops(0) is not None)
        assert 0 < line.get("perf/mfu", 0.5) < 1
    if not REHEARSED:
        found = PLANNED.search(outcomes[name][0].output)
        assert found, "what was planned beside what was seen"
        reserved, planned = map(float, found.groups())
        assert reserved <= planned - CUDA_CONTEXT / GIB, "torch reserves nothing of the context"


@needs_gpus(4)
def test_a_second_copy_of_the_parameters_changes_no_step(demo: Path, tmp_path: Path) -> None:
    """hpZ on four ranks, as if they were two hosts of two."""

    def case(name: str, **changed: object) -> Case:
        options = {"gradient_accumulation_steps": 1, "total_steps": STEPS, "freeze_vit": True}
        return Case(name, words_of(demo, tmp_path / name, ds_config=name, **options, **changed))

    outcomes = run_cases(tmp_path / "launch", [case("zero3"), case("zero3_hpz", num_shard=2)], ranks=4)
    for outcome in outcomes.values():
        assert_done(outcome)
    assert "zero_hpz_partition_size 2" in outcomes["zero3_hpz"][0].output
    expected = losses(tmp_path / "zero3")
    for step, found in losses(tmp_path / "zero3_hpz").items():
        assert found == pytest.approx(expected[step], rel=FP32), step


@only_on_a_gpu
def test_more_ranks_than_gpus_are_refused_in_one_message(demo: Path, tmp_path: Path) -> None:
    finished = deepspeed(TRAIN, words_of(demo, tmp_path), ranks=GPUS + 1, timeout=300, env=ON_GPU)
    assert finished.code != 0 and "Traceback" not in finished.output
    assert f"{GPUS} usable GPU(s), but {GPUS + 1} ranks" in finished.output
