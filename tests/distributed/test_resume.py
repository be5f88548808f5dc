"""A run that was stopped goes on as if it had not been: same steps, same data, same numbers.

In fp32 on equal ranks the resumed losses equal the uninterrupted run's to the last bit, because state is saved in fp32
and sums run in the same order. On another number of ranks or under another stage only the order of sums differs:
measured 1e-7 after two steps, so 1e-5 is asked.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.distributed.cases import Case, Outcome, arguments, learning_rates, losses, run_cases
from tests.distributed.started import StartedRun
from tests.launch import TRAIN, run_ranks, shared_memory

pytestmark = pytest.mark.distributed

LAUNCH_SECONDS = 600
WARMUP = 3  # steps, of the runs with a cosine after it


@pytest.mark.timed
def test_a_killed_run_started_again_finishes_at_exactly_total_steps(demo: Path, tmp_path: Path) -> None:
    words = arguments(demo, tmp_path, total_steps=20, save_every=7, max_num_tokens=448, auto_resume=True, num_workers=1)
    _run_until(words, tmp_path, step=15)
    before = losses(tmp_path)
    assert max(before) >= 15 and not (tmp_path / "checkpoints" / "step_20").exists()

    finished = run_ranks(TRAIN, words, ranks=2, timeout=LAUNCH_SECONDS)
    assert finished.code == 0, finished.output[-4000:]
    assert "resumed after step 14" in finished.output and "done: 20 steps" in finished.output
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(max(before) + 1), *range(14, 20)]
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_14",
        "step_20",
        "step_7",
        "step_final",
    ]
    assert (checkpoints / "latest").read_text().strip() == "step_20"
    assert os.readlink(checkpoints / "step_final") == "step_20"
    assert json.loads((checkpoints / "step_20" / "trainer.json").read_text())["steps_done"] == 20


def _run_until(words: list[str], results: Path, step: int) -> None:
    """Start a 2-rank launch and kill all of it, without warning, once `step` is logged."""
    with StartedRun(words, results) as run:
        run.until_step(step)
        assert shared_memory(run.port) == [], (
            "the kernel frees what has no name with the last rank, also of a killed run"
        )
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        run.all_ended()


# ------------------------------------------------------------------------------------ the same numbers, every way on
@pytest.fixture(scope="module")
def resumed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """Six steps in one go, and again from its second in many ways. Each run's results lie in a folder of its name."""
    folder = tmp_path_factory.mktemp("resumed")

    def case(name: str, come_from: str | None, total: int, **changed: object) -> Case:
        options = {"precision": "fp32", "max_num_tokens": 448, "save_every": 2, "total_steps": total, **changed}
        if come_from is not None:
            options["resume_from"] = folder / come_from
        return Case(name, arguments(demo, folder / name, **options))

    start = "whole/checkpoints/step_2"
    schedule = {"lr_scheduler": "cosine", "warmup_steps": WARMUP}
    outcomes = run_cases(
        folder / "two",
        [
            case("whole", None, 6),
            case("again", start, 6),
            case("worker", start, 6, num_workers=1),
            case("zero2", start, 4, ds_config="zero2"),
            case("zero3_cpu", "zero2/checkpoints/step_4", 6, ds_config="zero3_cpu"),
            case("other_budget", start, 6, max_num_tokens=700),
            case("weights_only", start, 1, resume_model_only=True),
            case("finished", "whole/checkpoints/step_6", 6, num_workers=1),
            case("cosine", None, 6, **schedule),
            case("cosine_again", "cosine/checkpoints/step_2", 6, **schedule),
        ],
        ranks=2,
    )
    on_one = [
        case("one_rank", start, 4, gradient_accumulation_steps=2),
        case("cosine_on_one", "cosine/checkpoints/step_2", 6, gradient_accumulation_steps=2, **schedule),
    ]
    outcomes |= run_cases(folder / "one", on_one)
    outcomes |= run_cases(folder / "back", [case("two_ranks", "one_rank/checkpoints/step_4", 6)], ranks=2)
    return folder, outcomes


@pytest.mark.parametrize("name", ["cosine_again", "cosine_on_one"])
def test_the_learning_rate_goes_on_through_warmup_and_cosine(
    name: str, resumed: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    """Resumed inside the warm-up; on one rank twice as many micro-batches make a step."""
    folder, outcomes = resumed
    assert outcomes[name][0].code == 0, outcomes[name][0].output
    whole = learning_rates(folder / "cosine")
    assert 0 == whole[0] < whole[1] < whole[2] < whole[WARMUP] > whole[4] > whole[5] > 0
    assert learning_rates(folder / name) == {step: whole[step] for step in range(2, 6)}
    if name == "cosine_again":
        expected = losses(folder / "cosine")
        assert losses(folder / name) == {step: expected[step] for step in range(2, 6)}


@pytest.mark.parametrize("name", ["again", "worker"])
def test_losses_after_a_resume_equal_the_uninterrupted_run_exactly(
    name: str, resumed: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = resumed
    assert outcomes[name][0].code == 0, outcomes[name][0].output
    whole = losses(folder / "whole")
    assert losses(folder / name) == {step: whole[step] for step in range(2, 6)}


@pytest.mark.parametrize(
    ("name", "steps"),
    [("zero2", range(2, 4)), ("zero3_cpu", range(4, 6)), ("one_rank", range(2, 4)), ("two_ranks", range(4, 6))],
)
def test_another_stage_or_number_of_ranks_goes_on_with_the_same_losses(
    name: str, steps: range, resumed: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = resumed
    assert outcomes[name][0].code == 0, outcomes[name][0].output
    whole, found = losses(folder / "whole"), losses(folder / name)
    assert list(found) == list(steps)
    for step in steps:
        assert found[step] == pytest.approx(whole[step], rel=1e-5), step


def test_another_token_budget_goes_on_at_the_same_place_in_the_data(
    resumed: tuple[Path, dict[str, list[Outcome]]],
) -> None:
    main, other = resumed[1]["other_budget"]
    assert (main.code, other.code) == (0, 0), main.output
    assert "continues at the same place in the data" in main.output


def test_resume_model_only_starts_at_step_0_with_the_weights(resumed: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = resumed
    assert outcomes["weights_only"][0].code == 0, outcomes["weights_only"][0].output
    assert "only the weights" in outcomes["weights_only"][0].output
    assert list(losses(folder / "weights_only")) == [0]


def test_a_run_that_is_done_is_left_as_it_is(resumed: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = resumed
    assert outcomes["finished"][0].code == 0, outcomes["finished"][0].output
    assert "done: 6 steps" in outcomes["finished"][0].output
    assert losses(folder / "finished") == {} and list((folder / "finished" / "checkpoints").iterdir()) == []
