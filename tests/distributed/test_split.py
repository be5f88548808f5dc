"""Training with split masters is training with fp32 ones, and checkpoints lead from one to the other.

What one update of every preset does is in test_adam.py, networks of other sizes are in test_offload_equality.py, saves
that overlap a step and resumes in test_saving.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_ds.checkpoint.state import EMA, StateFiles
from bagel_ds.checkpoint.step_folders import STATE, step_folders
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.ranges import MASTER
from bagel_ds.zero.partitions import MOMENTS
from tests.distributed.cases import Case, Outcome, arguments, losses, run_cases

pytestmark = pytest.mark.distributed

FULL = {"at": "write", "rank": 1, "do": "full", "times": 1}
STEPS = 3
Runs = tuple[Path, dict[str, list[Outcome]]]


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Each run's results lie in a folder of its name."""
    folder = tmp_path_factory.mktemp("split")

    def case(name: str, preset: str, come_from: str | None = None, faults: bool = False, **changed: object) -> Case:
        options = {"precision": "bf16", "max_num_tokens": 448, "save_every": 2, "total_steps": STEPS, **changed}
        options |= {"ds_config": preset, "ema_dtype": "bf16", "nvme_path": folder / "drive" / name}
        if come_from is not None:
            options["resume_from"] = folder / come_from
        return Case(name, arguments(demo, folder / name, **options), faults=[FULL] if faults else [])

    outcomes = run_cases(
        folder / "two",
        [
            case("fp32", "zero3_cpu"),
            case("split", "zero3_cpu_split"),
            case("to_split", "zero3_cpu_split", "fp32/checkpoints/step_2"),
            case("to_fp32", "zero3_cpu", "split/checkpoints/step_2"),
            case("nvme", "zero3_nvme_split"),
            case("from_nvme", "zero3_cpu_split", "nvme/checkpoints/step_2"),
            case("to_nvme", "zero3_nvme_split", "fp32/checkpoints/step_2"),
            case("to_stage_2", "zero2_cpu_split", "split/checkpoints/step_2"),
            case("packed", "zero3_cpu_split_8bit"),
            case("full", "zero3_cpu_split_8bit", faults=True),
            case("on_gpu", "zero3_split"),  # the same code, on the CPU
        ],
        ranks=2,
    )
    on_one = case("packed_on_one", "zero3_cpu_split_8bit", "packed/checkpoints/step_2", gradient_accumulation_steps=2)
    return folder, outcomes | run_cases(folder / "one", [on_one])


def done(runs: Runs, name: str) -> dict[int, object]:
    """The losses of a run that ended well."""
    folder, outcomes = runs
    assert [each.code for each in outcomes[name]] == [0] * len(outcomes[name]), outcomes[name][0].output
    return losses(folder / name)


def differences(one: Path, other: Path, step: int) -> dict[str, int]:
    """Elements that differ between two runs' weights, masters, moments and averages after a step, by kind."""
    states = [StateFiles(each / "checkpoints" / f"step_{step}" / STATE) for each in (one, other)]
    files = [TensorFiles([each / "checkpoints" / f"step_{step}" / "model.safetensors"]) for each in (one, other)]
    found = dict.fromkeys(("weights", MASTER, *MOMENTS, EMA), 0)
    compared = 0
    for name in files[0].names:
        weights, others = (file.read(name) for file in files)
        found["weights"] += int((weights != others).sum())
        if states[0].has(MASTER, name):
            compared += weights.numel()
            for kind in (MASTER, *MOMENTS, EMA):
                values, beside = (state.read(kind, name, 0, weights.numel()) for state in states)
                found[kind] += int((values != beside).sum())
    assert compared > 10**6
    return {kind: count for kind, count in found.items() if count}


def test_every_bit_is_that_of_fp32_masters(runs: Runs) -> None:
    folder, _ = runs
    assert done(runs, "split") == done(runs, "fp32") and len(done(runs, "fp32")) == STEPS
    for step in (2, STEPS):
        assert differences(folder / "split", folder / "fp32", step) == {}


@pytest.mark.slow
def test_a_hundred_steps_are_those_of_fp32_masters_to_the_last_bit(demo: Path, tmp_path: Path) -> None:
    presets, steps = ("zero3_cpu", "zero3_cpu_split"), 100
    short = {"precision": "bf16", "max_num_tokens": 448, "total_steps": steps, "save_every": steps, "lr": 2e-3}
    cases = [Case(name, arguments(demo, tmp_path / name, **short, ds_config=name)) for name in presets]
    outcomes = run_cases(tmp_path / "outcomes", cases, ranks=2)
    assert [outcomes[name][0].code for name in presets] == [0, 0], outcomes[presets[0]][0].output[-3000:]
    whole, found = (losses(tmp_path / name) for name in presets)
    assert found == whole and len(found) == steps
    assert differences(tmp_path / presets[1], tmp_path / presets[0], steps) == {}


def test_fp32_masters_become_split_ones_and_back(runs: Runs) -> None:
    folder, _ = runs
    whole = done(runs, "fp32")
    assert done(runs, "to_split") == {step: whole[step] for step in range(2, STEPS)}
    assert differences(folder / "to_split", folder / "fp32", STEPS) == {}
    back = done(runs, "to_fp32")
    # A resumed DeepSpeed computes its bias corrections in another way, which may show in a last bit.
    assert back == {step: pytest.approx(whole[step], rel=1e-3) for step in range(2, STEPS)}


def test_on_nvme_every_bit_is_the_same(runs: Runs) -> None:
    folder, _ = runs
    whole = done(runs, "fp32")
    assert done(runs, "nvme") == whole
    for name in ("to_nvme", "from_nvme"):
        assert done(runs, name) == {step: whole[step] for step in range(2, STEPS)}
    for name in ("nvme", "to_nvme", "from_nvme"):
        assert differences(folder / name, folder / "fp32", STEPS) == {}, name


def test_stage_2_goes_on_from_stage_3(runs: Runs) -> None:
    """It sums gradients in another order."""
    whole = done(runs, "fp32")
    assert done(runs, "to_stage_2") == {step: pytest.approx(whole[step], rel=5e-3) for step in range(2, STEPS)}


def test_split_masters_on_the_device_train_alike(runs: Runs) -> None:
    """Norms are summed in another order there."""
    whole = done(runs, "fp32")
    assert done(runs, "on_gpu") == {step: pytest.approx(whole[step], rel=5e-3) for step in range(STEPS)}


def test_packed_moments_train_alike_and_resume_on_another_number_of_ranks(runs: Runs) -> None:
    folder, _ = runs
    whole, packed = done(runs, "fp32"), done(runs, "packed")
    assert packed == {step: pytest.approx(whole[step], rel=5e-3) for step in range(STEPS)}
    assert packed != whole, "moments are rounded"
    found = done(runs, "packed_on_one")
    assert found == {step: pytest.approx(packed[step], rel=5e-3) for step in range(2, STEPS)}
    # What the packed run saved, a run on one rank holds exactly: its file of moments is what packed moments can hold.
    state = StateFiles(folder / "packed" / "checkpoints" / "step_2" / STATE)
    name = next(name for name in TensorFiles([folder / "packed/checkpoints/step_2/model.safetensors"]).names)
    squares = state.read("exp_avg_sq", name, 0, 64)
    roots = squares.sqrt()
    assert torch.equal(roots.view(torch.int32) & (2**19 - 1), torch.zeros(len(roots), dtype=torch.int32))


def test_a_disk_that_fills_costs_one_save(runs: Runs) -> None:
    folder, outcomes = runs
    assert done(runs, "full") == done(runs, "packed")
    assert "step_2 could not be saved: the disk: No space left on device" in outcomes["full"][0].output
    assert [step for step, _ in step_folders(folder / "full" / "checkpoints")] == [3]
    assert differences(folder / "full", folder / "packed", STEPS) == {}
