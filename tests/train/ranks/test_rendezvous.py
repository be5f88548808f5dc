"""Ranks that can't meet say why in one message, and who waits for ranks says so."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.ranks import rendezvous
from bagel_ds.train.ranks.launcher import Launch
from bagel_ds.train.ranks.rendezvous import check_meeting_point
from tests.launch import cpu_environment, free_port

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def launch(port: int, rank: int = 0) -> Launch:
    return Launch(rank, 2, rank, 2, "127.0.0.1", port, "deepspeed")


@pytest.fixture(params=["every address", "loopback"])
def taken(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as server:
        server.bind(("" if request.param == "every address" else "127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_message_with_a_free_one(taken: int) -> None:
    with pytest.raises(UserError, match=f"can't listen on port {taken} .it is in use on this host") as caught:
        check_meeting_point(launch(taken))
    offered = int(str(caught.value).split("--master_port ")[1].split()[0])
    check_meeting_point(launch(offered))


def test_only_who_listens_looks_at_the_port(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_meeting_point(launch(taken, rank=1))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    check_meeting_point(launch(taken))


def test_a_free_port_passes() -> None:
    check_meeting_point(launch(free_port()))


def test_a_port_that_only_root_may_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(rendezvous, "_listen_error", lambda port: refused if port < 1024 else None)
    with pytest.raises(UserError, match=r"port 80 \(Permission denied\).*--master_port 1024"):
        check_meeting_point(launch(80))


# A rank that finds nobody, with a patience of seconds, and what it says while it waits.
LOST = """
import logging, os, sys
from bagel_ds.machine import waiting
from bagel_ds.errors import UserError
from bagel_ds.train.ranks import rendezvous
from bagel_ds.train.ranks.launcher import read_launch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
waiting.FIRST, rendezvous._GRACE_SECONDS, rendezvous._MEET_SECONDS = 0.5, 0.0, 4.0
try:
    rendezvous.meet(read_launch(os.environ), "I am here")
except UserError as fault:
    print(f"ERROR: {fault}")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_nobody_says_where_it_looked(rank: int) -> None:
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", LOST], env=cpu_environment(**place), stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert ran.returncode == 0
    assert f"waiting for all 2 ranks to join at 127.0.0.1:{port} (" in ran.stdout
    (message,) = (line for line in ran.stdout.splitlines() if line.startswith("ERROR"))
    for word in (f"rank {rank} on ", f"127.0.0.1:{port}", "imed out", "--master_addr", "firewall", "all 2 ranks ("):
        assert word in message
