"""Checkpoints of an earlier run are gone on with, moved aside on request, and never replaced."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint.step_folders import MANIFEST, write_json
from bagel_ds.errors import UserError
from bagel_ds.train.saves.earlier import check_unoccupied, set_aside
from tests.train.saves.test_start import checkpoint, sound_start_of


def arguments(tmp_path: Path, **given: Any) -> TrainingArguments:
    return TrainingArguments(
        **{"checkpoint_dir": str(tmp_path / "ck"), "results_dir": str(tmp_path / "results"), **given}
    )


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """An earlier run's folders; its checkpoint_dir."""
    for step in (10, 20, 29, 36):
        checkpoint(tmp_path / "ck", step)
    (tmp_path / "ck" / "latest").write_text("step_36\n")
    (tmp_path / "ck" / "step_final").symlink_to("step_36")
    results = tmp_path / "results"
    (results / "tensorboard").mkdir(parents=True)
    for name in ("metrics.jsonl", "log.txt", "config.yaml", "config_1.yaml", "tensorboard/events", "notes.txt"):
        (results / name).write_text(f"the earlier {name}")
    return tmp_path / "ck"


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------------------------------------- refused
def other_run(tmp_path: Path) -> str:
    return str(checkpoint(tmp_path / "other", 50))


FORGOTTEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "from the model": lambda folder: {"finetune_from_hf": True},
    "with the last one kept": lambda folder: {"finetune_from_hf": True, "keep_last": 2},
    "with states removed": lambda folder: {"finetune_from_hf": True, "del_previous_state": True},
    "from parts": lambda folder: {},
    "from another run": lambda folder: {"resume_from": other_run(folder)},
    "from another run's weights": lambda folder: {"resume_from": other_run(folder), "resume_model_only": True},
    "from its own weights": lambda folder: {"resume_from": str(folder / "ck" / "step_36"), "resume_model_only": True},
    "from an older one of its own": lambda folder: {"resume_from": str(folder / "ck" / "step_20")},
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_run_that_would_replace_an_earlier_runs_checkpoints_is_refused(
    name: str, earlier: Path, tmp_path: Path
) -> None:
    given = FORGOTTEN[name](tmp_path)
    before = everything(tmp_path)
    with pytest.raises(UserError) as caught:
        check_unoccupied(arguments(tmp_path, **given), [])
    for words in (str(earlier), "step_10, step_20, step_29, step_36", "--auto_resume True", "--start_anew True"):
        assert words in str(caught.value)
    assert "another --checkpoint_dir" in str(caught.value)
    assert everything(tmp_path) == before


def _damaged(folder: Path) -> None:
    checkpoint(folder, 7).joinpath(MANIFEST).unlink()


def _linked(folder: Path) -> None:
    checkpoint(folder.parent / "big_disk", 7)
    (folder / "step_7").symlink_to(folder.parent / "big_disk" / "step_7")


def _about_to_be_replaced(folder: Path) -> None:
    checkpoint(folder, 7).rename(folder / ".replaced-step_7")


def _weights_alone(folder: Path) -> None:
    checkpoint(folder, 7, state=False)


def _of_another_program(folder: Path) -> None:
    (folder / "step_7").write_text("")


@pytest.mark.parametrize("left", [_damaged, _linked, _about_to_be_replaced, _weights_alone, _of_another_program])
def test_whatever_has_a_checkpoints_name_counts(left: Any, tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    left(tmp_path / "ck")
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run \(step_7\)"):
        check_unoccupied(arguments(tmp_path, finetune_from_hf=True), [])


@pytest.mark.parametrize("left", [_linked, _weights_alone, _of_another_program])
def test_auto_resume_does_not_begin_again_over_what_it_cannot_go_on_from(left: Any, tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    left(tmp_path / "ck")
    with pytest.raises(
        UserError, match=r"\(step_7\); none of them holds a training state.*--auto_resume False --start"
    ):
        check_unoccupied(arguments(tmp_path, finetune_from_hf=True, auto_resume=True), [])


@pytest.mark.parametrize("left", [None, "step_final", "step_x", ".unfinished-step_7", "earlier_1", "latest"])
def test_a_folder_without_checkpoints_is_free(left: str | None, tmp_path: Path) -> None:
    if left is not None:
        (tmp_path / "ck" / left).mkdir(parents=True)
    check_unoccupied(arguments(tmp_path, finetune_from_hf=True), [])


def test_going_on_with_the_newest_is_allowed(earlier: Path, tmp_path: Path) -> None:
    check_unoccupied(arguments(tmp_path, auto_resume=True), [])
    for name in ("step_36", "step_final"):
        check_unoccupied(arguments(tmp_path, resume_from=str(earlier / name)), [])
    _about_to_be_replaced(tmp_path / "ck2")
    check_unoccupied(arguments(tmp_path, auto_resume=True, checkpoint_dir=str(tmp_path / "ck2")), [])


# ----------------------------------------------------------------------------------------------------- moved aside
def test_start_anew_moves_all_of_the_earlier_run_aside_and_deletes_nothing(earlier: Path, tmp_path: Path) -> None:
    (earlier / ".unfinished-step_40").mkdir()
    training = arguments(tmp_path, finetune_from_hf=True, start_anew=True)
    checkpoints, results = everything(earlier), everything(tmp_path / "results")
    check_unoccupied(training, [tmp_path / "model"])
    assert set_aside(training, None, tmp_path / "model") == [tmp_path / "results" / "earlier_1", earlier / "earlier_1"]
    assert [path.name for path in earlier.iterdir()] == ["earlier_1"]
    assert everything(earlier / "earlier_1") == checkpoints
    assert (earlier / "earlier_1" / "step_final" / "trainer.json").is_file()
    assert (earlier / "earlier_1" / ".unfinished-step_40").is_dir()
    assert results.pop("notes.txt") == (tmp_path / "results" / "notes.txt").read_text(), "not the run's"
    assert everything(tmp_path / "results" / "earlier_1") == results
    assert set_aside(training, None, tmp_path / "model") == [], "nothing is left to move"
    checkpoint(earlier, 3)
    assert set_aside(training, None, tmp_path / "model") == [earlier / "earlier_2"]


def test_the_run_moved_aside_can_be_gone_on_with(earlier: Path, tmp_path: Path) -> None:
    set_aside(arguments(tmp_path, start_anew=True), None, tmp_path / "model")
    check_unoccupied(arguments(tmp_path, auto_resume=True, checkpoint_dir=str(earlier / "earlier_1")), [])


def test_one_folder_for_both_is_moved_to_one(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    set_aside(
        arguments(tmp_path, start_anew=True, **dict.fromkeys(("checkpoint_dir", "results_dir"), str(tmp_path))),
        None,
        tmp_path,
    )
    assert sorted(path.name for path in (tmp_path / "earlier_1").iterdir()) == ["metrics.jsonl", "step_5"]


def test_start_anew_does_not_move_what_it_starts_from(earlier: Path, tmp_path: Path) -> None:
    training = arguments(tmp_path, start_anew=True)
    for path in (earlier / "step_36", earlier / "step_final", earlier / "step_10" / "model.safetensors"):
        with pytest.raises(UserError, match="--start_anew True would move .* from which this run starts"):
            check_unoccupied(training, [tmp_path / "model", path])


def test_metrics_of_another_run_are_moved_aside_and_their_own_are_gone_on_with(earlier: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    fresh = arguments(tmp_path, checkpoint_dir=str(tmp_path / "empty"))
    other = Path(other_run(tmp_path))
    saved = json.loads((other / "trainer.json").read_text())
    mine = {**saved, "arguments": {"results_dir": str(results)}}
    theirs = {**saved, "arguments": {"results_dir": str(tmp_path / "theirs")}}
    assert set_aside(arguments(tmp_path), saved, earlier / "step_36") == [], "auto_resume"
    assert set_aside(fresh, mine, other) == [], "the same results_dir as before"
    before = everything(results)
    assert set_aside(fresh, theirs, other) == [results / "earlier_1"]
    assert before.pop("notes.txt") and everything(results / "earlier_1") == before
    (results / "metrics.jsonl").write_text("{}\n")
    assert set_aside(fresh, None, tmp_path / "model") == [results / "earlier_2"]
    assert (earlier / "step_36").is_dir()
    (results / "metrics.jsonl").write_text("")
    (results / "log.txt").write_text("this run's")
    assert set_aside(fresh, None, tmp_path / "model") == [], "no step was logged"


# --------------------------------------------------------------------------------------------------- what latest says
def _gone(folder: Path) -> None:
    (folder / "latest").write_text("step_50\n")


def _linked_to_another(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step_10")


def _incomplete(folder: Path) -> None:
    (folder / "step_20" / MANIFEST).unlink()
    (folder / "latest").write_text("step_20\n")


LATEST: dict[str, tuple[Callable[[Path], object], str]] = {
    "another complete one": (lambda folder: (folder / "latest").write_text("step_20\n"), "names step_20, a complete"),
    "a link to another": (_linked_to_another, "names step_10, a complete"),
    "none": (lambda folder: (folder / "latest").unlink(), "is missing or does not name a step"),
    "empty": (lambda folder: (folder / "latest").write_text(""), "is missing or does not name a step"),
    "one that is gone": (_gone, "names step_50, which is missing"),
    "one that is incomplete": (_incomplete, "names step_20, which is missing or incomplete"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", LATEST)
def test_auto_resume_goes_by_number_and_says_where_latest_differs(
    name: str, earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = LATEST[name]
    logging.getLogger("bagel_ds").propagate = True
    assert sound_start_of(tmp_path, auto_resume=True).folder == earlier / "step_36"
    assert caplog.messages == []
    change(earlier)
    assert sound_start_of(tmp_path, auto_resume=True).folder == earlier / "step_36"
    (line,) = caplog.messages
    assert "auto_resume resumes from step_36, the newest complete" in line and words in line


@pytest.mark.usefixtures("one_rank")
def test_a_dangling_latest_is_named_also_where_no_checkpoint_is_left(
    earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("bagel_ds").propagate = True
    for step in (10, 20, 29, 36):
        shutil.rmtree(earlier / f"step_{step}")
    assert not sound_start_of(tmp_path, auto_resume=True, finetune_from_hf=True).full
    (line,) = caplog.messages
    assert "auto_resume finds no complete checkpoint" in line and "latest names step_36, which is missing" in line
    (earlier / "latest").unlink()
    assert not sound_start_of(tmp_path, auto_resume=True, finetune_from_hf=True).full
    assert len(caplog.messages) == 1


def test_a_sweep_takes_only_what_a_save_has_left(tmp_path: Path) -> None:
    from bagel_ds.checkpoint.step_folders import sweep

    (tmp_path / ".unfinished-step_3").mkdir()
    kept = [".unfinished-export-exported", ".replaced-by_me", ".unfinished-step_x", "unfinished-step_3"]
    for name in kept:
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "file.json", {})
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
