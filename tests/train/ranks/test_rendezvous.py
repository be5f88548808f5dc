"""Ranks that can't meet say why in one message, and who waits for ranks says so."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

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


# A rank with a patience of seconds for the others, and what it says while it waits.
MEETS = """
import logging, os, sys
from bagel_ds.machine import waiting
from bagel_ds.errors import UserError
from bagel_ds.train.ranks import rendezvous
from bagel_ds.train.ranks.launcher import read_launch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
patience, planned = float(sys.argv[1]), sys.argv[2:]
waiting.FIRST = waiting.EVERY = rendezvous._LOOK_SECONDS = 0.5
rendezvous._GRACE_SECONDS, rendezvous._MEET_SECONDS = 0.0, patience
try:
    store, said = rendezvous.meet(read_launch(os.environ), f"I am {os.environ['RANK']}", planned)
    print("MET", *(message.decode() for message in said), flush=True)
    store.add("over", 1)
    while store.add("over", 0) < int(os.environ["WORLD_SIZE"]):
        pass
except UserError as fault:
    print(f"ERROR: {fault}")
"""


class Ranks:
    """Processes that run MEETS; leaving the block ends all that are left."""

    def __init__(self, folder: Path, world_size: int, patience: float, planned: Sequence[str] = ()):
        self.folder, self.port, self._words = folder, free_port(), [str(patience), *planned]
        self._world_size, self._started = world_size, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()

    def start(self, rank: int) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "RANK": str(rank)}
        with (self.folder / f"{rank}.txt").open("w") as log:
            self._started[rank] = subprocess.Popen(
                [sys.executable, "-c", MEETS, *self._words],
                env=cpu_environment(**place, WORLD_SIZE=str(self._world_size)),
                stdout=log,
            )

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.txt").read_text()

    def until(self, rank: int, words: str) -> None:
        deadline = time.monotonic() + 120
        while words not in self.said(rank):
            assert time.monotonic() < deadline and self._started[rank].poll() is None, self.said(rank)
            time.sleep(0.05)

    def end(self, rank: int) -> str:
        assert self._started[rank].wait(300) == 0
        return self.said(rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_nobody_says_where_it_looked(rank: int, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, 4.0) as ranks:
        ranks.start(rank)
        said = ranks.end(rank)
    place = f"127.0.0.1:{ranks.port}"
    awaited = (f"rank 1 to join at {place}; rank 0 (", f"rank 0 to answer at {place}; this is rank 1 on ")
    assert f"waiting for {awaited[rank]}" in said and "`bagel-ds doctor --hostfile FILE`" in said
    (message,) = (line for line in said.splitlines() if line.startswith("ERROR"))
    why = ("after 4 s rank 1 missing, rank 0 (", "imed out")
    for word in (f"rank {rank} on ", place, why[rank], "--master_addr", "firewall", "all 2 ranks ("):
        assert word in message


def test_ranks_that_never_come_are_named_with_their_hosts(tmp_path: Path) -> None:
    """On every rank that has come, although the store ends with rank 0."""
    with Ranks(tmp_path, 4, 20.0, ["node1", "node1", "node2", "node2"]) as ranks:
        ranks.start(0)
        ranks.until(0, "waiting for ranks 1 (node1), 2 to 3 (node2) to join")
        ranks.start(1)
        here, found = socket.gethostname(), [ranks.end(rank) for rank in (0, 1)]
    both = f"ranks 0 to 1 ({here}) here"
    assert f"waiting for ranks 2 to 3 (node2) to join at 127.0.0.1:{ranks.port}; {both} (" in found[0]
    assert "waiting" not in found[1], "rank 0 says it"
    for said in found:
        assert f"ranks 2 to 3 (node2) missing, {both}." in said.splitlines()[-1]


def test_a_rank_that_comes_late_is_awaited(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, 300.0) as ranks:
        for rank in (0, 2):
            ranks.start(rank)
        ranks.until(0, "waiting for rank 1 to join")
        ranks.start(1)
        for rank in range(3):
            assert "MET I am 0 I am 1 I am 2" in ranks.end(rank)


def test_ranks_are_listed_by_host() -> None:
    listed = rendezvous._by_host([(0, "a"), (1, "a"), (2, "b"), (4, "b"), (5, ""), (6, "")])
    assert listed == "ranks 0 to 1 (a), 2 (b), 4 (b), 5 to 6"
    assert rendezvous._by_host([(rank, str(rank)) for rank in range(99)]).endswith("15 (15), ...")
