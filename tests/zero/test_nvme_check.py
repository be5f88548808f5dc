"""Drives that can't work are reported before training, with the folder and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.zero.nvme_check import check_drives, check_space, file_system, free_bytes


def test_a_good_drive_is_named_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    (note,) = check_drives([folder])
    assert str(folder) in note and file_system(tmp_path) in note and "free" in note
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_memory_is_refused() -> None:
    if file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm on this machine")
    with pytest.raises(UserError, match="which is memory"):
        check_drives([Path("/dev/shm")])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        check_drives([tmp_path / "file" / "folder"])


def test_too_little_space_is_reported_with_both_numbers(tmp_path: Path) -> None:
    check_space([tmp_path], free_bytes(tmp_path) // 2)
    with pytest.raises(UserError, match=rf"{tmp_path} has \d+ .iB free, this run needs 931323 GiB"):
        check_space([tmp_path], 10**15)
