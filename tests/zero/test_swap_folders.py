"""Folders of swap files go away with the last rank that holds them, however it ends, and never before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.zero.swap_folders import leave_folders, run_folder, sweep_folders, take_folder

REPOSITORY = Path(__file__).resolve().parents[2]

# Holds a folder as a rank does, until a line comes in; a forked child lives on, as a process that somebody forks may.
RANK = """
import os, sys, time
from pathlib import Path
from bagel_ds.zero.swap_folders import leave_folders, take_folder
folder = Path(sys.argv[1])
take_folder(folder, first=sys.argv[2] == "first")
(folder / f"rank{os.getpid()}.swp").write_bytes(b"swapped")
if (child := os.fork()) == 0:
    time.sleep(60)
print(child, flush=True)
sys.stdin.readline()
leave_folders()
"""


@contextmanager
def rank(folder: Path, place: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `folder`; a line to it makes it leave."""
    command = [sys.executable, "-c", RANK, str(folder), place]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def leaves(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(60) == 0


def test_the_last_rank_to_leave_removes_the_folder(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "checkpoints")
    with rank(folder, "first") as one, rank(folder, "then") as other:
        leaves(one)
        assert len(list(folder.glob("*.swp"))) == 2, "the other rank still uses them"
        leaves(other)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_removes_what_killed_runs_left_and_nothing_that_lives(tmp_path: Path) -> None:
    """A run under another preset or checkpoint_dir finds folders of other names, some of them of before the lock."""
    killed, lives, old = (run_folder(tmp_path, name) for name in ("killed", "lives", "old"))
    (old / "zero_stage_3").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    with rank(killed, "first") as gone, rank(lives, "first") as one:
        assert sweep_folders(str(tmp_path)) == [old]
        gone.kill()
        gone.wait()
        assert sweep_folders(str(tmp_path)) == [killed]
        assert sorted(tmp_path.iterdir()) == sorted([lives, tmp_path / "mine"]) and list(lives.glob("*.swp"))
        leaves(one)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_sweep_takes_no_folder_that_only_begins_like_ours(tmp_path: Path) -> None:
    names = ["bagel_ds_data", "bagel_ds_gone_fishing", "bagel_ds_0123456789abc", "bagel_ds_0123456789AB", "bagel_ds"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    left = tmp_path / f"bagel_ds_gone_{'0' * 32}"
    left.mkdir()
    assert sweep_folders(str(tmp_path)) == [left]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all([path.name for path in (tmp_path / name).iterdir()] == ["precious"] for name in names)


def test_a_folder_that_a_live_run_holds_is_refused_with_its_name(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "checkpoints")
    with rank(folder, "first") as one:
        with pytest.raises(UserError, match=f"--nvme_path: {folder} is in use .*process {one.pid}"):
            take_folder(folder, first=True, patience=0)
        assert list(folder.glob("*.swp"))
        one.kill()
        one.wait()
        take_folder(folder, first=True, patience=0)
        assert list(folder.glob("*.swp")) == [], "what a killed run left in this run's own folder"
    leave_folders()
    assert list(tmp_path.iterdir()) == []


def test_containers_of_one_inner_path_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for host in ("container-1", "container-2", "container-1"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        names.append(run_folder(tmp_path, "/results/checkpoints").name)
    assert names[0] == names[2] != names[1]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        take_folder(run_folder(tmp_path / "file", "checkpoints"), first=True)
    assert sweep_folders(str(tmp_path / "absent")) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from bagel_ds.train import main
from bagel_ds.zero.swap_folders import run_folder, take_folder

def run_rank(config, by):
    path = Path(config.training.nvme_path)
    take_folder(run_folder(path, "checkpoints"), first=True)
    (path / "reached").touch()
    os.kill(os.getpid(), signal.SIGKILL)

main.run_rank = run_rank
sys.exit(main.main(["--nvme_path", sys.argv[1]]))
"""


def test_files_of_a_rank_that_was_killed_are_removed_by_the_process_that_waited_for_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("BAGEL_DS_DETACH", None)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, timeout=120)
    assert ended.returncode == 137
    assert list(tmp_path.iterdir()) == [tmp_path / "reached"]
