"""When a run should stop: one wish however many signals, files and limits; who is asked and who is not."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.cli.main import main
from bagel_ds.errors import UserError
from bagel_ds.train.process import stop
from bagel_ds.train.process.detach import STOP_SIGNALS
from bagel_ds.train.process.stop import StopRequest, forget_stops, write_stop_file
from bagel_ds.train.saves.lock import FILE, remember


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A StopRequest listens for the rest of the process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def request(folder: Path, stop_after: float | None = None, watches_file: bool = True) -> StopRequest:
    return StopRequest([folder / "results", folder / "checkpoints"], stop_after, watches_file)


def test_without_a_reason_it_goes_on(tmp_path: Path) -> None:
    assert request(tmp_path, stop_after=3600).wanted() is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_wish_and_a_second_at_once_the_same_one(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wish = request(tmp_path)
    for _ in range(3):
        os.kill(os.getpid(), number)
    assert wish.wanted() == f"{signal.Signals(number).name} received"
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_later_second_signal_ends_the_process_at_once() -> None:
    program = """
import os, signal, time
from pathlib import Path
from bagel_ds.train.process import stop
wish = stop.StopRequest([], None, False)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
stop.SAME_SIGNAL_SECONDS = 0.05
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(stop.__file__).parents[3])}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, env=environment, check=False
    )
    assert ended.returncode == 128 + signal.SIGINT
    assert "second signal: stopping immediately, without saving" in ended.stderr


@pytest.mark.parametrize("folder", ["results", "checkpoints"])
def test_a_stop_file_in_either_folder_is_a_wish_and_is_removed(folder: str, tmp_path: Path) -> None:
    for name in ("results", "checkpoints"):
        (tmp_path / name).mkdir()
    wish = request(tmp_path)
    path = write_stop_file(tmp_path / folder)
    assert wish.wanted() == "a stop file was written"
    wish.remove_files()
    assert not path.exists() and request(tmp_path).wanted() is None


def test_one_rank_looks_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    write_stop_file(tmp_path / "results")
    other = request(tmp_path, watches_file=False)
    assert other.wanted() is None
    other.remove_files()
    assert (tmp_path / "results" / "stop").exists()


def test_a_time_limit_is_a_wish_once_it_has_passed(tmp_path: Path) -> None:
    wish = request(tmp_path, stop_after=0.05)
    time.sleep(0.06)
    assert wish.wanted() == "--stop_after has passed"


def test_the_command_asks_a_run_that_is_there(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By its checkpoint_dir, and by the results_dir that leads there."""
    results = tmp_path / "results"
    results.mkdir()
    remember(results, tmp_path)
    for folder in (tmp_path, results):
        assert main(["stop", str(folder)]) == 0
        said = capsys.readouterr().out
        assert (folder / "stop").exists() and f"the run (process {holder.pid} on " in said
        assert "saves and ends after its current step" in said


def test_the_command_says_where_there_is_nothing_to_stop(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    empty, ended = tmp_path / "empty", tmp_path / "ended"
    empty.mkdir()
    ended.mkdir()
    remember(ended, tmp_path)
    holder.kill()
    holder.wait()
    for folder in (empty, ended, tmp_path):  # the killed run has left its file, without a lock
        assert main(["stop", str(folder)]) == 2
        said = capsys.readouterr()
        assert f"no run uses {folder}" in said.err and said.out == ""
        assert not (folder / "stop").exists()
    assert main(["stop", str(tmp_path / "absent")]) == 2
    assert "is not a folder; pass the results_dir or checkpoint_dir" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(UserError, match="can't be written .Permission denied."):
        write_stop_file(tmp_path)


@pytest.mark.parametrize("where", ["elsewhere", "unlocked", "unseen"])
def test_where_it_cannot_tell_the_command_asks_and_says_so(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "elsewhere":
        (tmp_path / FILE).write_text("process 1 on another-host\n")
    elif where == "unlocked":  # as a file system without locks leaves it
        (tmp_path / FILE).touch()
    else:
        remember(tmp_path, tmp_path / "of another container")
    assert main(["stop", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "stop").exists() and "a run that uses this folder ends" in said and "the run (" not in said


def test_a_stop_file_that_cannot_be_removed_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    logging.getLogger("bagel_ds").propagate = True
    wish = request(tmp_path)
    monkeypatch.setattr(Path, "unlink", refused)
    wish.remove_files()
    assert "stop can't be removed (Operation not permitted): remove it before the next start" in caplog.text
    with pytest.raises(UserError, match="stop asks this run to stop and can't be removed"):
        forget_stops([tmp_path])


def test_a_stop_meant_for_an_earlier_run_is_forgotten(tmp_path: Path) -> None:
    write_stop_file(tmp_path)
    forget_stops([tmp_path, tmp_path / "not there"])
    assert StopRequest([tmp_path], None, watches_file=True).wanted() is None
