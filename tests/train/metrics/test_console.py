"""What a run prints: log lines, log.txt and the progress bar."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.metrics.console import log_line, setup_logging
from bagel_ds.train.metrics.log import MetricsLog
from tests.train.metrics.metric_names import METRIC_NAMES


def test_the_line_is_the_originals_down_to_the_last_comma() -> None:
    values = {"loss/mse": 0.40631, "loss/ce": 0.55042, "perf/step_seconds": 100.0}
    expected = "(step=0000000) Train Loss mse: 0.4063, Train Loss ce: 0.5504, Train Steps/Sec: 0.01, "
    assert log_line(0, values) == expected
    assert log_line(1234567, {**values, "optim/lr": 2e-5}).startswith(expected.replace("0000000", "1234567"))


def test_a_loss_that_was_not_measured_is_not_in_the_line() -> None:
    assert log_line(3, {"loss/mse": 0.5, "perf/step_seconds": 0.5}) == (
        "(step=0000003) Train Loss mse: 0.5000, Train Steps/Sec: 2.00, "
    )


def test_every_contracted_number_but_per_dataset_ones_is_in_the_line() -> None:
    full = dict.fromkeys(METRIC_NAMES, 0.5)
    for name in METRIC_NAMES:
        assert log_line(0, full) != log_line(0, {key: value for key, value in full.items() if key != name}), name


def test_log_txt_holds_the_dated_line_and_the_console_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path, rank=0)
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        metrics.log(7, {"loss/mse": 0.4063, "loss/ce": 0.5504, "perf/step_seconds": 2.0})
        logging.getLogger("bagel_ds").info("saved step_8")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    dated = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
    assert re.fullmatch(
        dated + r"\(step=0000007\) Train Loss mse: 0\.4063, Train Loss ce: 0\.5504, Train Steps/Sec: 0\.50, ", first
    )
    assert re.fullmatch(dated + "saved step_8", second)
    assert capsys.readouterr().out.splitlines() == [first, second]


def test_log_txt_continues_after_a_restart_and_lines_are_not_doubled(tmp_path: Path) -> None:
    setup_logging(tmp_path, rank=0).info("one")
    setup_logging(tmp_path, rank=0).info("two")
    assert [line.split("] ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_other_ranks_show_warnings_with_their_rank_and_write_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = setup_logging(tmp_path / "results", rank=3)
    logger.info("not shown")
    logger.warning("slow disk")
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.rstrip().endswith("[rank 3] WARNING: slow disk")
    assert not (tmp_path / "results").exists()


def test_a_results_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"--results_dir .*taken.*can't be written"):
        setup_logging(tmp_path / "taken", rank=0)


def test_no_progress_bar_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(MetricsLog(tmp_path, 0, total_steps=2)) as metrics:
        metrics.advance()
    assert capsys.readouterr().err == ""


def test_a_progress_bar_wanted_without_a_terminal_comes_in_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAGEL_DS_PROGRESS", "1")
    monkeypatch.setattr("bagel_ds.train.metrics.console._BarInLines.EVERY", 0.0)
    with closing(MetricsLog(tmp_path, 30, total_steps=33)) as metrics:
        for _ in range(3):
            metrics.advance()
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert [re.search(r"^train: .* (\d+)/33 ", line)[1] for line in shown.splitlines()] == ["31", "32", "33"]  # type: ignore[index]


def test_the_progress_bar_counts_from_the_resumed_step_and_keeps_log_lines_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    setup_logging(tmp_path, rank=0)
    with closing(MetricsLog(tmp_path, 30, total_steps=60)) as metrics:
        for step in range(30, 60):
            metrics.advance()
            metrics.log(step, {"loss/mse": 0.5})
    shown = capsys.readouterr()
    assert "30/60" in shown.err and "60/60" in shown.err
    assert [line.split("] ")[1] for line in shown.out.splitlines()] == [
        f"(step={step:07d}) Train Loss mse: 0.5000, " for step in range(30, 60)
    ]
