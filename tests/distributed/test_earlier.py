"""Real runs over an earlier run's folders: refused, gone on with, or beginning again beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bagel_ds.train.saves.lock import claim
from tests.distributed.cases import Case, Outcome, arguments, run_cases
from tests.distributed.started import StartedRun
from tests.train.saves.test_start import checkpoint

pytestmark = pytest.mark.distributed


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def outcomes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """One run's folders, and what came of further starts in them, one after the other."""
    folder = tmp_path_factory.mktemp("earlier")

    def case(name: str, **changed: object) -> Case:
        return Case(name, arguments(demo, folder / "run", save_every=2, **changed))

    cases = [
        case("first", total_steps=4),
        case("forgotten", total_steps=3, keep_last=1, del_previous_state=True),
        case("too_few", total_steps=3, auto_resume=True),
        case("finished", total_steps=4, auto_resume=True),
        case("changed", total_steps=5, auto_resume=True, freeze_llm=True),
        case("again", total_steps=1, start_anew=True, lr=1e-4),
    ]
    return folder / "run", {name: ranks[0] for name, ranks in run_cases(folder / "out", cases).items()}


def test_a_forgotten_auto_resume_is_refused(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    results, found = outcomes
    refused = found["forgotten"]
    assert refused.code == 2 and "Traceback" not in refused.output
    for words in ("(step_2, step_4)", "--auto_resume True", "another --checkpoint_dir", "--start_anew True"):
        assert words in refused.output
    assert "loading" not in refused.output


def test_a_total_below_the_steps_done_is_refused(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    too_few = outcomes[1]["too_few"]
    assert too_few.code == 2 and "Traceback" not in too_few.output
    assert "--total_steps 3: " in too_few.output and "has already done 4 steps" in too_few.output
    assert "stopped" not in too_few.output


def test_a_finished_run_says_that_nothing_is_left(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    finished = outcomes[1]["finished"]
    assert finished.code == 0, finished.output
    assert "nothing is left to train" in finished.output and "done: 4 steps" in finished.output
    assert "changed since" not in finished.output


def test_a_resume_says_once_what_changed(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    changed = outcomes[1]["changed"]
    assert changed.code == 0, changed.output
    assert "changed since step_4 was saved:" in changed.output
    assert "--freeze_llm: False -> True" in changed.output and "--total_steps: 4 -> 5" in changed.output
    assert changed.output.count("data plan changed since the checkpoint") == 1
    assert "tokenizer" not in changed.output and "dropout" not in changed.output
    assert "resumed after step 4" in changed.output


def test_start_anew_leaves_the_earlier_run_whole_beside_the_new_one(
    outcomes: tuple[Path, dict[str, Outcome]],
) -> None:
    results, found = outcomes
    assert found["again"].code == 0, found["again"].output
    new, old = results / "checkpoints", results / "checkpoints" / "earlier_1"
    assert sorted(path.name for path in new.iterdir()) == ["earlier_1", "latest", "step_1", "step_final"]
    assert sorted(path.name for path in old.iterdir()) == ["latest", "step_2", "step_4", "step_5", "step_final"]
    assert json.loads((old / "step_2" / "trainer.json").read_text())["steps_done"] == 2
    records = results / "earlier_1"
    steps = [json.loads(line)["step"] for line in (records / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4], "refused and finished starts have added nothing"
    assert json.loads((results / "metrics.jsonl").read_text())["step"] == 0
    assert list((records / "tensorboard").iterdir()) and list((results / "tensorboard").iterdir())
    assert "done: 5 steps" in (records / "log.txt").read_text()
    log = (results / "log.txt").read_text()
    assert f"moved the files of an earlier run to {records}" in log and "done: 1 steps" in log

    def lr(path: Path) -> float:
        return float(yaml.safe_load(path.read_text())["training"]["lr"])

    assert lr(results / "config.yaml") == 1e-4 and lr(records / "config.yaml") == 1e-3
    kept = [yaml.safe_load((records / f"config_{n}.yaml").read_text())["training"] for n in (1, 2)]
    assert [config["auto_resume"] for config in kept] == [False, True]


def test_a_run_that_waited_its_turn_does_not_begin_over_what_the_other_saved(demo: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    held = claim(checkpoints)
    assert held is not None
    with StartedRun(arguments(demo, tmp_path, total_steps=1), tmp_path, ranks=1) as run:
        run.until(lambda: "waiting for that run to end" in run.output, "waiting")
        checkpoint(checkpoints, 5)
        held.release()
        assert run.end() == 2
        assert "holds checkpoints of an earlier run (step_5)" in run.output and "Traceback" not in run.output
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_5"]
