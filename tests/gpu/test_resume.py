"""A state saved on a GPU is taken up on the same ranks, under other presets, and by CPU ranks, whose state goes back.

NCCL refuses several ranks on one GPU, so that one GPU shows another number of ranks through two ranks on the CPU
(DS_ACCELERATOR=cpu); two GPUs also show it among themselves. Everything is in fp32 and compared with a run that was not
stopped: losses, and after two more steps the optimizer's states, which would show moments that were lost.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bagel_ds.checkpoint.state import StateFiles
from bagel_ds.ranges import MASTER
from bagel_ds.zero.partitions import MOMENTS
from tests.distributed import cases
from tests.distributed.cases import Case, Outcome, losses
from tests.gpu.launches import FP32, ON_CPU, RANKS, assert_done, metrics, needs_gpus, run_cases, words_of

WEIGHTS = "model.safetensors"
START, MIDDLE, END = 2, 4, 6
ELSEWHERE = ("zero0", "zero1", "zero2", "zero2_cpu", "zero3_cpu", "zero3_nvme", "zero3_nvme_all")
STATES_TOLERANCE = 1e-2  # of a norm; moments that start again from zero differ by more than half

Resumed = tuple[Path, dict[str, list[Outcome]]]


@pytest.fixture(scope="module")
def resumed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Each run's results lie in a folder of its name."""
    folder = tmp_path_factory.mktemp("resumed")

    def case(name: str, come_from: str | None, total: int, **changed: object) -> Case:
        results = folder / name
        options = {"save_every": 2, "total_steps": total, "nvme_path": results / "nvme", **changed}
        if come_from is not None:
            options["resume_from"] = folder / come_from / "checkpoints" / f"step_{total - 2}"
        return Case(name, words_of(demo, results, **options))

    # From CPU memory to the GPU's and from NVMe to CPU memory, beside those from the GPU's memory.
    chained = [
        case("cpu_to_gpu", "zero3_cpu", END, ds_config="zero2"),
        case("nvme_to_cpu", "zero3_nvme", END, ds_config="zero3_cpu"),
    ]
    several = [case("whole", None, END), case("again", "whole", MIDDLE, num_workers=1)]
    several += [case(preset, "whole", MIDDLE, ds_config=preset) for preset in ELSEWHERE]
    outcomes = run_cases(folder / "launch", [*several, *chained])
    on_cpu = case("on_cpu", "whole", MIDDLE, gradient_accumulation_steps=1)
    outcomes |= cases.run_cases(folder / "cpu", [on_cpu], ranks=2, timeout=600, env=ON_CPU)
    outcomes |= run_cases(folder / "back", [case("back", "on_cpu", END)])
    return folder, outcomes


def assert_goes_on(folder: Path, name: str, steps: range) -> None:
    whole, found = losses(folder / "whole"), losses(folder / name)
    assert list(found) == list(steps)
    for step in steps:
        assert found[step] == pytest.approx(whole[step], rel=FP32), step
    done, other = (folder / run / "checkpoints" / f"step_{steps.stop}" for run in ("whole", name))
    expected, states, weights = StateFiles(done / "state"), StateFiles(other / "state"), load_file(done / WEIGHTS)
    for kind in (MASTER, *MOMENTS):
        squares = [0.0, 0.0]
        for parameter, weight in weights.items():
            if expected.has(kind, parameter):
                ours, theirs = (state.read(kind, parameter, 0, weight.numel()) for state in (states, expected))
                squares[0] += float((ours - theirs).double().square().sum())
                squares[1] += float(theirs.double().square().sum())
        assert squares[0] ** 0.5 <= STATES_TOLERANCE * squares[1] ** 0.5, kind


@pytest.mark.parametrize("name", ["again", *ELSEWHERE, "on_cpu"])
def test_a_state_saved_on_the_gpu_is_taken_up_anywhere(name: str, resumed: Resumed) -> None:
    folder, outcomes = resumed
    assert_done(outcomes[name])
    assert_goes_on(folder, name, range(START, MIDDLE))


@pytest.mark.parametrize("name", ["cpu_to_gpu", "nvme_to_cpu", "back"])
def test_a_state_saved_elsewhere_is_taken_up_on_the_gpu(name: str, resumed: Resumed) -> None:
    """`back` was saved by two ranks on the CPU."""
    folder, outcomes = resumed
    assert_done(outcomes[name])
    assert_goes_on(folder, name, range(MIDDLE, END))


def test_a_run_on_the_cpu_of_this_host_is_a_cpu_run_throughout(resumed: Resumed) -> None:
    folder, outcomes = resumed
    assert_done(outcomes["on_cpu"])
    assert "memory peaks: host" in outcomes["on_cpu"][0].output, "no part of it on a GPU"
    for line in metrics(folder / "on_cpu"):
        assert not [key for key in line if key.startswith("memory/device")]


@needs_gpus(2)
def test_one_gpu_takes_up_what_two_saved_and_the_other_way_round(demo: Path, resumed: Resumed, tmp_path: Path) -> None:
    folder, outcomes = resumed
    assert_done(outcomes["whole"])
    assert RANKS == 2

    def case(name: str, start: Path, total: int, accumulation: int) -> Case:
        options = {"gradient_accumulation_steps": accumulation, "save_every": 2, "total_steps": total}
        return Case(name, words_of(demo, folder / name, resume_from=start, **options))

    one = case("on_one", folder / "whole/checkpoints" / f"step_{START}", MIDDLE, accumulation=2)
    assert_done(run_cases(tmp_path / "one", [one], ranks=1)["on_one"])
    two = case("on_two", folder / "on_one/checkpoints" / f"step_{MIDDLE}", END, accumulation=1)
    assert_done(run_cases(tmp_path / "two", [two], ranks=2)["on_two"])
    assert_goes_on(folder, "on_one", range(START, MIDDLE))
    assert_goes_on(folder, "on_two", range(MIDDLE, END))
