"""Ranks that can't meet say why in one message, and who waits for ranks says so."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train import rendezvous
from bagel_ds.train.agreement import SharedFault
from bagel_ds.train.rendezvous import check_meeting_point
from tests.launch import cpu_environment, free_port

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["every address", "loopback"])
def taken(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as server:
        server.bind(("" if request.param == "every address" else "127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_message_with_a_free_one(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(taken))
    with pytest.raises(UserError, match=f"can't listen on port {taken} .it is in use on this host") as caught:
        check_meeting_point()
    offered = int(str(caught.value).split("--master_port ")[1].split()[0])
    monkeypatch.setenv("MASTER_PORT", str(offered))
    check_meeting_point()


@pytest.mark.parametrize("name, value", [("RANK", "1"), ("TORCHELASTIC_USE_AGENT_STORE", "True")])
def test_only_who_listens_looks_at_the_port(name: str, value: str, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(taken))
    monkeypatch.setenv(name, value)
    check_meeting_point()


def test_a_free_port_and_none_at_all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    check_meeting_point()
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    check_meeting_point()


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "", "29500 "])
def test_what_is_no_port_is_said_by_the_first_rank(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"{port}: expected a whole number from 1 to 65535") as caught:
        check_meeting_point()
    assert not isinstance(caught.value, SharedFault)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SharedFault):
        check_meeting_point()


def test_a_port_that_only_root_may_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "80")
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(rendezvous, "_listen_error", lambda port: refused if port < 1024 else None)
    with pytest.raises(UserError, match=r"port 80 \(Permission denied\).*--master_port 1024"):
        check_meeting_point()


# A rank that finds nobody, with a patience of seconds, and what it says while it waits.
LOST = """
import datetime, logging, sys
import torch.distributed as dist
from bagel_ds import waiting
from bagel_ds.errors import UserError
from bagel_ds.train import rendezvous
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
waiting.FIRST, rendezvous._GRACE_SECONDS = 0.5, 0.0
try:
    with rendezvous.meeting():
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
except UserError as fault:
    print(f"ERROR: {fault}")
"""


def test_a_rank_that_meets_nobody_says_where_it_looked() -> None:
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", LOST], env=cpu_environment(**place), stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert ran.returncode == 0
    assert f"waiting for all 2 ranks to join at 127.0.0.1:{port} (" in ran.stdout
    (message,) = (line for line in ran.stdout.splitlines() if line.startswith("ERROR"))
    for word in ("rank 1 on ", f"127.0.0.1:{port}", "timed out", "--master_addr", "firewall"):
        assert word in message
