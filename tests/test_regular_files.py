"""What can't be opened is named and never opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bagel_ds.config_files import LARGEST_FILE, read_json, read_text, read_yaml
from bagel_ds.errors import UserError
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.regular_files import file_fault, folder_fault


def make(path: Path, kind: str) -> Path:
    """Something at `path` that is not a regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(path.parent / "gone")
    return path


FAULTS = {
    "pipe": "it is a named pipe, not a file",
    "socket": "it is a socket, not a file",
    "folder": "it is a folder, not a file",
    "dangling link": "it is a link to .*gone, which does not exist",
    "nothing": "no such file",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_configurations_that_are_no_files_are_named_and_not_opened(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "it", kind)
    for read in (read_text, read_yaml, read_json):
        with pytest.raises(UserError, match=f"{path} can't be read: {FAULTS[kind]}"):
            read(path)
    assert pointer_fault(path) is None


def test_folders_and_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert file_fault(tmp_path / "file") is None and folder_fault(tmp_path) is None
    assert folder_fault(tmp_path / "file") == "it is a file, not a folder"
    assert folder_fault(tmp_path / "gone") == "no such folder"
    assert file_fault("/dev/zero") == "it is a device, not a file"


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_names_that_no_file_can_have_are_faults(tmp_path: Path, name: str) -> None:
    assert file_fault(tmp_path / name)


def test_a_data_file_passed_as_a_configuration_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    with open(path, "wb") as file:
        file.truncate(LARGEST_FILE)
    assert len(read_text(path)) == LARGEST_FILE
    with open(path, "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UserError, match="larger than 64 MiB"):
        read_text(path)
