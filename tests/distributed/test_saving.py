"""Saving while the next step computes changes nothing: not what is trained, not what is saved.

Every run here saves after each step, and rank 1 begins to write its states only when the next step waits for them. Were
an update not to wait, or anything of a step to touch the states before it, files would hold another step's numbers.
"""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.checkpoint.step_folders import newest_state, step_folders
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
from tests.distributed.started import StartedRun, send
from tests.launch import TRAIN, run_ranks

pytestmark = pytest.mark.distributed

LATE = {"at": "write", "rank": 1, "do": "late"}
HOSTS = {"at": "hosts", "do": "nothing"}
FULL = {"at": "write", "rank": 1, "do": "full", "times": 1}
FULL_WHILE_GATHERING = {"at": "gather", "do": "full", "times": 1}
OTHERS = of_launches(  # preset and micro-batches of a step
    (("zero0", 1), ("zero3_cpu", 2), ("zero3_cpu_split_8bit", 1)),
    (("zero2", 2), ("zero3", 1), ("zero1", 1), ("zero2_cpu", 1)),
)

Runs = tuple[Path, dict[str, list[Outcome]]]


def words_of(demo: Path, results: Path, **changed: object) -> list[str]:
    return arguments(demo, results, **{"precision": "fp32", "max_num_tokens": 448, "save_every": 100, **changed})


def late_and_not(demo: Path, folder: Path, preset: str, accumulation: int) -> list[Case]:
    """Three steps that are all saved, the same with ranks on several hosts, which gather the weights, three and two
    that are saved only at their end, and a third step from the second that was saved. Each run's results lie in a
    folder of its name."""
    config: dict[str, Any] = {"ds_config": preset, "gradient_accumulation_steps": accumulation}
    if "split" in preset:
        config |= {"precision": "bf16", "ema_dtype": "bf16"}
    runs: dict[str, dict[str, Any]] = {
        "late": {"total_steps": 3, "save_every": 1},
        "hosts": {"total_steps": 3, "save_every": 1},
        "whole": {"total_steps": 3},
        "short": {"total_steps": 2},
        "resumed": {"total_steps": 3, "resume_from": folder / "late" / "checkpoints" / "step_2"},
    }
    gathers = {"at": "gather", "do": "nothing", "marker": str(folder / "gathered")}
    faults = {"late": [LATE], "hosts": [HOSTS, LATE, gathers]}
    return [
        Case(name, words_of(demo, folder / name, **options, **config), faults=faults.get(name, []))
        for name, options in runs.items()
    ]


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("saving")
    cases = late_and_not(demo, folder, "zero3", 2)
    options = {"ds_config": "zero3", "gradient_accumulation_steps": 2, "save_every": 1}
    full = {"full": (3, [FULL]), "full_on_hosts": (3, [HOSTS, FULL_WHILE_GATHERING]), "full_at_last": (1, [FULL])}
    for name, (total, faults) in full.items():
        cases.append(Case(name, words_of(demo, folder / name, total_steps=total, **options), faults=faults))
    return folder, run_cases(folder / "launch", cases, ranks=2)


def assert_alike(runs: Runs) -> None:
    folder, outcomes = runs
    for name in ("late", "hosts", "whole", "short", "resumed"):
        assert outcomes[name][0].code == 0, outcomes[name][0].output
    assert (folder / "gathered").exists()
    expected = losses(folder / "whole")
    assert list(expected) == [0, 1, 2] and losses(folder / "late") == losses(folder / "hosts") == expected
    assert losses(folder / "resumed") == {2: expected[2]}
    assert [step for step, _ in step_folders(folder / "late" / "checkpoints")] == [1, 2, 3]
    for overlapped in ("late", "hosts"):
        two, three = (checksums(folder / overlapped, step) for step in (2, 3))
        assert two == checksums(folder / "short", 2), "saved while the third step computed"
        assert three == checksums(folder / "whole", 3)
    assert checksums(folder / "resumed", 3) == checksums(folder / "whole", 3)


def test_a_save_that_overlaps_training_changes_neither_losses_nor_files(runs: Runs) -> None:
    assert_alike(runs)


@pytest.fixture(scope="module")
def others(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The same runs under each preset."""

    @cache
    def launched(presets: tuple[tuple[str, int], ...]) -> tuple[Path, dict[str, dict[str, list[Outcome]]]]:
        folder = tmp_path_factory.mktemp("others")
        sets = {preset: late_and_not(demo, folder / preset, preset, count) for preset, count in presets}
        return folder, run_sets(folder / "launch", sets, ranks=2)

    return launched


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "preset", "accumulation"), OTHERS)
def test_nor_does_it_under_another_stage_or_offload(
    launch: Any, preset: str, accumulation: int, others: Launches
) -> None:
    folder, outcomes = others(launch)
    assert_alike((folder / preset, outcomes[preset]))


NVME = {"ds_config": "zero3_nvme"}
ADAPTERS = {"ds_config": "zero2", "lora_rank": 4, "lora_targets": ".*"}


@pytest.mark.slow
def test_states_that_move_and_adapters_are_gathered_alike(demo: Path, tmp_path: Path) -> None:
    """States on NVMe are gathered before training goes on."""
    cases = []
    for kind, options in (("nvme", {**NVME, "nvme_path": tmp_path / "nvme"}), ("adapters", ADAPTERS)):
        for place, faults in (("here", []), ("hosts", [HOSTS])):
            words = words_of(demo, tmp_path / f"{kind}_{place}", total_steps=2, save_every=1, **options)
            cases.append(Case(f"{kind}_{place}", words, faults=faults))
    outcomes = run_cases(tmp_path / "launch", cases, ranks=2)
    for name, (main, _) in outcomes.items():
        assert main.code == 0, main.output
        assert ("before training goes on" in main.output) == name.startswith("nvme")
    for kind in ("nvme", "adapters"):
        for step in (1, 2):
            assert checksums(tmp_path / f"{kind}_hosts", step) == checksums(tmp_path / f"{kind}_here", step)


@pytest.mark.slow
def test_a_rank_that_fails_while_it_gathers_ends_the_run(demo: Path, tmp_path: Path) -> None:
    """Rank 0 waits for its weights meanwhile, and other calls of the ranks for rank 0."""
    broken = {"at": "gather", "rank": 1, "do": "break", "times": 1}
    words = words_of(demo, tmp_path / "run", total_steps=3, save_every=1)
    with StartedRun(words, tmp_path / "run", faults=[HOSTS, broken]) as run:
        assert run.end() == 1, run.output[-4000:]
        assert "ArithmeticError: only this rank fails" in run.output
        assert "[rank 0] rank 1 has ended (ArithmeticError" in run.output
    assert step_folders(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("name", ["full", "full_on_hosts"])
def test_a_disk_that_fills_while_it_is_written_costs_that_save_alone(name: str, runs: Runs) -> None:
    """The states of rank 1, or on rank 0 the weights that all ranks of several hosts gather there."""
    folder, outcomes = runs
    main, other = outcomes[name]
    assert (main.code, other.code) == (0, 0), main.output
    assert "step_1 could not be saved: the disk: No space left on device" in main.output
    assert "Training goes on" in main.output and "saved" in main.output
    assert losses(folder / name) == losses(folder / "whole")
    left = sorted(path.name for path in (folder / name / "checkpoints").iterdir() if not path.is_symlink())
    assert left == ["latest", "step_2", "step_3"]
    assert checksums(folder / name, 3) == checksums(folder / "whole", 3)


def test_a_disk_that_fills_under_the_last_save_is_an_error(runs: Runs) -> None:
    folder, outcomes = runs
    main, other = outcomes["full_at_last"]
    assert (main.code, other.code) == (2, 2), main.output
    assert "ERROR: " in main.output and "No space left on device" in main.output
    assert not list((folder / "full_at_last" / "checkpoints").glob("*step_1")), "neither finished nor unfinished"


@pytest.mark.slow
def test_a_kill_while_the_next_step_waits_for_a_save_leaves_the_one_before_in_charge(
    demo: Path, tmp_path: Path
) -> None:
    marker, results = tmp_path / "writing", tmp_path / "run"
    words = words_of(demo, results, total_steps=4, save_every=2, auto_resume=True)
    first = {"at": "write", "rank": 1, "do": "nothing", "times": 1}
    with StartedRun(words_of(demo, results, total_steps=2, auto_resume=True), results, faults=[first]) as run:
        assert run.end() == 0, run.output[-4000:]
    held = {"at": "write", "rank": 1, "do": "sleep", "seconds": 300, "marker": str(marker)}
    with StartedRun(
        words_of(demo, results, total_steps=4, save_every=1, auto_resume=True), results, faults=[held]
    ) as run:
        run.until(marker.exists, "a state being written")
        send(run.ranks(), signal.SIGKILL)
        assert run.process.wait(120) != 0
        run.all_ended()
    checkpoints = results / "checkpoints"
    assert newest_state(checkpoints) == checkpoints / "step_2" and (checkpoints / "latest").read_text() == "step_2\n"
    assert (checkpoints / ".unfinished-step_3").is_dir()
    finished = run_ranks(TRAIN, words, ranks=2)
    assert finished.code == 0 and "removing" in finished.output, finished.output[-4000:]
    assert [step for step, _ in step_folders(checkpoints)] == [2, 4]
