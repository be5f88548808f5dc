"""One file over HTTP: continued, started again if it is another one now, or one message."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.hub.transfer import fetch
from tests.hub.server import Server

CONTENT = random.Random(2).randbytes(200_000)


def test_a_server_that_sends_nothing_more_is_given_up_and_a_later_call_continues(
    server: Server, tmp_path: Path
) -> None:
    server.files["/file"] = CONTENT
    server.cuts = [0.5] + [0.0] * 5
    with pytest.raises(UserError) as caught:
        fetch(server.url + "/file", tmp_path / "file")
    assert "the connection ended after 100,000 of 200,000 bytes" in str(caught.value)
    assert f"stays in {tmp_path / 'file.part'}: the same command continues there" in str(caught.value)
    assert not (tmp_path / "file").exists()
    server.cuts = []
    fetch(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and server.sent["/file"] == len(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_many_cuts_are_survived_as_long_as_bytes_arrive(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    server.cuts = [0.1] * 12
    fetch(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_is_not_glued_to_the_old_one(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    server.cuts = [0.5] + [0.0] * 5
    with pytest.raises(UserError):
        fetch(server.url + "/file", tmp_path / "file")
    server.files["/file"], server.cuts = CONTENT[::-1], []
    fetch(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT[::-1]


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    server.cuts = [0.5] + [0.0] * 5
    with pytest.raises(UserError):
        fetch(server.url + "/file", tmp_path / "file")
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    server.cuts = []
    fetch(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_address_is_told_at_once_and_a_busy_server_asked_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the server says 404 .*; check the address"):
        fetch(server.url + "/other", tmp_path / "file")
    assert len(server.asked) == 1
    server.refusal = 503
    with pytest.raises(UserError, match="the server says 503"):
        fetch(server.url + "/file", tmp_path / "file")
    assert len(server.asked) == 6


def test_a_host_that_can_not_be_reached_is_told_with_the_way_by_hand(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="download it on another machine and copy it to"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file")
