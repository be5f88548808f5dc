"""One run at a time in a checkpoint_dir: claims are waited for, end with their process, and leave nothing behind."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.saves import lock as module
from bagel_ds.train.saves.lock import FILE, claim


def test_a_claim_is_taken_and_leaves_nothing(tmp_path: Path) -> None:
    held = claim(tmp_path)
    assert held is not None and (tmp_path / FILE).exists()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_one_that_does_not_end_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid} on .*bagel-ds stop"):
        claim(tmp_path, patience=0.2)


@pytest.mark.parametrize("killed", [True, False])
def test_it_is_taken_over_once_the_other_ends(killed: bool, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    ending = threading.Timer(1.0, holder.kill if killed else holder.stdin.close)
    ending.start()
    began = time.monotonic()
    held = claim(tmp_path, patience=30)
    assert held is not None and time.monotonic() - began > 0.5
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "lockf", unsupported)
    assert claim(tmp_path) is None
