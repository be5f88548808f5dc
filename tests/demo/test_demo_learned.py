"""The end of `make demo-long`: what counts as learned, and the picture."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from bagel_ds.demo.learned import SHOWN, examples, main, verdict
from bagel_ds.demo.one_move import write_one_move


@pytest.fixture
def results(demo: Path, tmp_path: Path) -> Path:
    """A demo with puzzles and a run whose checkpoint is the untrained model."""
    write_one_move(tmp_path, random.Random(0), train_rows=8, test_rows=2 * SHOWN)
    folder = tmp_path / "results"
    checkpoint = folder / "checkpoints" / "step_400"
    shutil.copytree(demo / "model", checkpoint)
    (checkpoint / "ema.safetensors").rename(checkpoint / "model.safetensors")
    return folder


def scores(results: Path, **shares: float) -> None:
    """What `bagel-ds evaluate --json` prints."""
    for name, share in shares.items():
        (results / f"{name}.json").write_text(json.dumps({"results": [{"scores": {"val/exact_answer": share}}]}))


@pytest.mark.parametrize(
    ("before", "after", "learned"),
    [(0.0, 0.95, True), (0.25, 0.8, True), (0.0, 0.79, False), (0.5, 0.85, False), (0.95, 0.95, False)],
)
def test_learned_means_many_right_answers_and_many_more_than_before(before: float, after: float, learned: bool) -> None:
    found, line = verdict(before, after)
    assert found == learned
    assert f"{before:.1%} untrained, {after:.1%} trained" in line
    assert ("expected at least 80%" in line) != learned


@pytest.mark.parametrize(("after", "code"), [(0.9, 0), (0.3, 1)])
def test_it_prints_the_shares_draws_test_rows_and_fails_where_nothing_was_learned(
    results: Path, capsys: pytest.CaptureFixture[str], after: float, code: int
) -> None:
    scores(results, before=0.0, after=after)
    assert main([str(results.parent), str(results)]) == code
    assert f"0.0% untrained, {after:.1%} trained" in capsys.readouterr().out
    shown = examples(results.parent)
    assert [example.answer for example in shown] == ["up", "down", "left", "right"] * 2
    with Image.open(results / "answers.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(2**16) or []}
    assert {color for example in shown for _, color in example.picture.getcolors(2**16) or []} <= colors


def test_missing_or_other_scores_and_checkpoints_are_one_message(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(results.parent), str(results)]
    assert main(arguments) == 2
    assert "before.json is not the output of bagel-ds evaluate" in capsys.readouterr().err
    scores(results, before=0.0, after=0.9)
    (results / "after.json").write_text('{"results": []}')
    assert main(arguments) == 2
    assert "after.json is not the output" in capsys.readouterr().err
    scores(results, after=0.9)
    shutil.rmtree(results / "checkpoints")
    assert main(arguments) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
