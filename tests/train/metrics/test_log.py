"""What a run shows: log lines, log.txt, metrics.jsonl, TensorBoard, the progress bar and the W&B arguments."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.metrics.log import (
    METRIC_NAMES,
    METRIC_PREFIXES,
    MetricsLog,
    SilentMetricsLog,
    WandbOptions,
    check_wandb,
    log_line,
    setup_logging,
)


@pytest.fixture(autouse=True)
def quiet_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the logger "bagel_ds" and the environment as they were found."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "BAGEL_DS_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    yield
    logger = logging.getLogger("bagel_ds")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def json_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) that TensorBoard would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


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


def test_the_time_left_is_said_last_and_only_while_steps_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first logged step, which is slow, counts only until there is another one."""
    setup_logging(tmp_path, rank=0)
    now = iter([100.0, 100.0, 110.0, 130.0, 140.0])
    with MetricsLog(tmp_path, 40, total_steps=1040) as metrics:
        monkeypatch.setattr("bagel_ds.train.metrics.log.time", types.SimpleNamespace(monotonic=lambda: next(now)))
        next(now)
        for step in (40, 50, 60, 1039):
            metrics.log(step, {"loss/ce": 1.0, "perf/step_seconds": 60.0 if step == 40 else 1.0})
    lines = [line.split("] ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    original = [f"(step={step:07d}) Train Loss ce: 1.0000, Train Steps/Sec: " for step in (40, 50, 60, 1039)]
    expected = ["0.02, ETA: 16h39m, ", "1.00, ETA: 16m, ", "1.00, ETA: 24m, ", "1.00, "]
    assert lines == [line + rest for line, rest in zip(original, expected, strict=True)]


def test_without_an_end_there_is_no_time_left(tmp_path: Path) -> None:
    setup_logging(tmp_path, rank=0)
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.log(0, {"loss/ce": 1.0, "perf/step_seconds": 1.0})
    with MetricsLog(tmp_path, 0, total_steps=9) as metrics:
        metrics.log(0, {"loss/ce": 1.0})
    assert "ETA" not in (tmp_path / "log.txt").read_text()


def test_log_txt_holds_the_dated_line_and_the_console_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path, rank=0)
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.log(7, {"loss/mse": 0.4063, "loss/ce": 0.5504, "perf/step_seconds": 2.0})
        metrics.note("saved step_8")
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


def test_json_lines_and_tensorboard_hold_the_same_numbers_under_the_contracted_names(tmp_path: Path) -> None:
    names = [*METRIC_NAMES, *(prefix + "seedxedit_multi" for prefix in METRIC_PREFIXES)]
    logged = [{name: step + position / 64 for position, name in enumerate(names)} for step in range(3)]
    with MetricsLog(tmp_path, 0) as metrics:
        for step, values in enumerate(logged):
            metrics.log(step, dict(values))
    assert json_lines(tmp_path) == [{"step": step, **values} for step, values in enumerate(logged)]
    for name in names:
        assert scalars(tmp_path, name) == [(step, values[name]) for step, values in enumerate(logged)]


def test_each_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        for step in range(3):
            metrics.log(step, {"loss/total": 1.0})
            assert [line["step"] for line in json_lines(tmp_path)] == list(range(step + 1))


def test_none_is_left_out_and_non_finite_numbers_are_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.log(0, {"loss/mse": math.nan, "loss/ce": None, "loss/total": math.inf, "optim/grad_norm": -math.inf})
    assert json_lines(tmp_path) == [{"step": 0, "loss/mse": None, "loss/total": None, "optim/grad_norm": None}]
    ((step, value),) = scalars(tmp_path, "loss/mse")
    assert step == 0 and math.isnan(value)


def test_after_a_resume_both_continue_from_the_checkpoints_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        for step in range(6):
            metrics.log(step, {"loss/mse": 1.0})
    with MetricsLog(tmp_path, 4) as metrics:
        for step in range(4, 8):
            metrics.log(step, {"loss/mse": 2.0})
    assert [line["step"] for line in json_lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert scalars(tmp_path, "loss/mse") == [(step, 1.0 if step < 4 else 2.0) for step in range(8)]


def test_half_a_line_of_a_killed_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss/mse": 1.0}\n{"step": 1, "loss/m')
    with MetricsLog(tmp_path, 1) as metrics:
        metrics.log(1, {"loss/mse": 2.0})
    assert json_lines(tmp_path) == [{"step": 0, "loss/mse": 1.0}, {"step": 1, "loss/mse": 2.0}]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, 0)
    metrics.close()
    metrics.close()


def test_no_progress_bar_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, 0, total_steps=2) as metrics:
        metrics.advance(2)
    assert capsys.readouterr().err == ""


def test_a_progress_bar_wanted_without_a_terminal_comes_in_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAGEL_DS_PROGRESS", "1")
    monkeypatch.setattr("bagel_ds.train.metrics.log._BarInLines.EVERY", 0.0)
    with MetricsLog(tmp_path, 30, total_steps=33) as metrics:
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
    with MetricsLog(tmp_path, 30, total_steps=60) as metrics:
        for step in range(30, 60):
            metrics.advance()
            metrics.log(step, {"loss/mse": 0.5})
    shown = capsys.readouterr()
    assert "30/60" in shown.err and "60/60" in shown.err
    assert [line.split("] ")[1] for line in shown.out.splitlines()] == [
        f"(step={step:07d}) Train Loss mse: 0.5000, " for step in range(30, 60)
    ]


def test_the_silent_log_has_every_verb_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {name for name in vars(MetricsLog) if not name.startswith("_")}
    assert verbs <= set(vars(SilentMetricsLog))
    with SilentMetricsLog() as metrics:
        metrics.log(0, {"loss/mse": 0.5})
        metrics.advance()
        metrics.note("unseen")
    assert capsys.readouterr() == ("", "")


class FakeWandb(types.ModuleType):
    """Stands in for the package: records what it is asked."""

    class Error(Exception):
        pass

    def __init__(self, fault: str | None = None) -> None:
        super().__init__("wandb")
        self.fault = fault
        self.arguments: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = False

    def init(self, **arguments: Any) -> FakeWandb:
        if self.fault is not None:
            raise self.Error(self.fault)
        self.arguments = arguments
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a netrc file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_wandb_is_not_imported_unless_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it now raises
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.log(0, {"loss/mse": 0.5})


def test_wandb_wanted_but_not_installed_is_one_message(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"not installed.*pip install wandb.*--enable_wandb False"):
        check_wandb(WandbOptions())


def test_wandb_without_a_key_is_one_message_and_offline_needs_none(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(UserError, match=r"no API key.*WANDB_API_KEY.*--wandb_offline True"):
        MetricsLog(no_home / "results", 0, WandbOptions())
    check_wandb(WandbOptions(offline=True))


@pytest.mark.parametrize("where", ["environment", "netrc", "own server"])
def test_a_wandb_key_is_found_where_wandb_finds_it(where: str, no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    else:
        host = "api.wandb.ai" if where == "netrc" else "wandb.example.org"
        (no_home / ".netrc").write_text(f"machine {host} login user password {'x' * 40}\n")
        (no_home / ".netrc").chmod(0o600)
        if where == "own server":
            with pytest.raises(UserError):
                check_wandb(WandbOptions())
            monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}:8443")
    check_wandb(WandbOptions())


def test_wandb_gets_the_originals_id_and_every_step_even_after_going_back(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = WandbOptions("bagel", "blockmoving", "2", "allow", offline=True, config={"lr": 1e-5})
    with MetricsLog(no_home, 0, options) as metrics:
        metrics.log(5, {"loss/mse": 0.5, "loss/ce": None})
        metrics.log(3, {"loss/mse": 0.4})
    assert fake.arguments == {
        "project": "bagel",
        "name": "blockmoving",
        "id": "blockmoving-run2",
        "resume": "allow",
        "mode": "offline",
        "dir": str(no_home),
        "config": {"lr": 1e-5},
    }
    assert fake.logged == [{"step": 5, "loss/mse": 0.5}, {"step": 3, "loss/mse": 0.4}]
    assert ("*", "step") in fake.metrics and fake.finished


def test_wandb_refusing_to_start_is_one_message(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fault="project is archived"))
    with pytest.raises(UserError, match=r"could not start project 'bagel': project is archived"):
        MetricsLog(no_home, 0, WandbOptions(offline=True))


def test_a_full_disk_costs_numbers_told_once_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, 0)
    with monkeypatch.context() as full:

        def refused(step: int, values: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(log._sinks[0], "log", refused)
        logging.getLogger("bagel_ds").propagate = True
        with caplog.at_level(logging.WARNING, "bagel_ds"):
            log.log(0, {"loss/ce": 1.0})
            log.log(1, {"loss/ce": 1.0})
    assert caplog.text.count("No space left on device") == 1
    log.log(2, {"loss/ce": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2]
