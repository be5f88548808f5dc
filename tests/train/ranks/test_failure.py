"""A rank that fails while others go on ends at once; the others hear of it and end, wherever they are.

Ranks here are processes that share a store, as after `join_ranks`, and do what the test gives them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.train.ranks.agreement import SharedFault
from bagel_ds.train.ranks.failure import ending_alone
from tests.launch import free_port

REPOSITORY = Path(__file__).resolve().parents[3]

HEAD = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from bagel_ds.errors import UserError
from bagel_ds.train.ranks import alarm
from bagel_ds.train.ranks.agreement import SharedFault
from bagel_ds.train.ranks.failure import ending_alone
from bagel_ds.train.ranks.hosts import Hosts
from tests.train.ranks.rank_info import rank_on

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=100))
alarm.GRACE_SECONDS = alarm._GONE_SECONDS = 0.5
alarm.listen(store, Hosts(rank, (rank_on("a"), rank_on("b"))))

def explain(error):
    return UserError("out of memory; take less") if isinstance(error, MemoryError) else None

def hang():  # as in a collective call that the other rank never joins
    print("hangs", flush=True)
    time.sleep(300)
"""


@contextmanager
def two_ranks(*bodies: str) -> Iterator[list[subprocess.Popen[str]]]:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HEAD + body, str(rank), str(port)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, body in enumerate(bodies)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def outcomes(*bodies: str) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    with two_ranks(*bodies) as ranks:
        found = [process.communicate(timeout=120)[0] for process in ranks]
        return [(process.returncode, output) for process, output in zip(ranks, found)]


@pytest.mark.parametrize(
    ("failing", "failure", "code", "shown"),
    [
        (0, "UserError('no such file')", 2, "ERROR: no such file"),  # the rank that keeps the store
        (1, "MemoryError()", 2, "ERROR: out of memory; take less"),
        (1, "ZeroDivisionError('a bug')", 1, "ZeroDivisionError: a bug"),
    ],
)
def test_a_rank_that_fails_alone_ends_before_anything_is_closed_and_the_other_hears_of_it(
    failing: int, failure: str, code: int, shown: str
) -> None:
    fails = f"""
try:
    with ending_alone(explain):
        raise {failure}
finally:
    hang()  # what is closed on the way may wait for the other rank
"""
    found = outcomes(*(fails if rank == failing else "hang()" for rank in range(2)))
    (own_code, own_output), (other_code, other_output) = found[failing], found[1 - failing]
    assert own_code == code and shown in own_output and "hangs" not in own_output
    assert ("Traceback" in own_output) is (code == 1)
    assert other_code == 1 and "Traceback" not in other_output
    assert f"[rank {1 - failing}] rank {failing} on {'ab'[failing]} has ended (" in other_output
    assert other_output.rstrip().endswith("ending this rank, too")
    assert shown.removeprefix("ERROR: ").split(": ")[-1][:5] in other_output, "and why"


def test_what_a_failure_causes_on_another_rank_is_told_in_a_line() -> None:
    follows = """
with ending_alone(explain):
    while alarm.heard() is None:
        time.sleep(0.05)
    raise RuntimeError("Connection closed by peer")
"""
    fails = "with ending_alone(explain):\n    raise UserError('the cause')"
    (code_0, output_0), (code_1, output_1) = outcomes(follows, fails)
    assert (code_0, code_1) == (1, 2) and "ERROR: the cause" in output_1
    assert "[rank 0] rank 1 on b has ended (the cause); ending this rank, too" in output_0
    assert "Traceback" not in output_0 and "Connection closed" not in output_0


NEIGHBORS = """
import os, signal
alarm.close()
dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2)
pids = [None, None]
dist.all_gather_object(pids, os.getpid())
alarm.listen(store, Hosts(rank, tuple(rank_on("a", pid=pid) for pid in pids)))
"""


def test_a_neighbor_killed_in_the_middle_of_a_sum_is_named_in_a_line() -> None:
    sums = NEIGHBORS + "import torch\nwith ending_alone(explain):\n    dist.all_reduce(torch.ones(1))"
    killed = NEIGHBORS + "time.sleep(2)\nos.kill(os.getpid(), signal.SIGKILL)"
    with two_ranks(sums, killed) as (first, second):
        first_output, _ = first.communicate(timeout=120)
        assert first.returncode == 1 and second.wait(10) == -signal.SIGKILL
    assert f"[rank 0] rank 1 (process {second.pid}) has ended; ending this rank, too" in first_output
    assert "Traceback" not in first_output, "of the connection, which is not the cause"


def test_a_failure_of_its_own_keeps_its_traceback_beside_a_killed_neighbor() -> None:
    fails = NEIGHBORS + "time.sleep(4)\nwith ending_alone(explain):\n    raise RuntimeError('a bug')"
    killed = NEIGHBORS + "time.sleep(1)\nos.kill(os.getpid(), signal.SIGKILL)"
    (code, output), _ = outcomes(fails, killed)
    assert code == 1 and "Traceback" in output and "RuntimeError: a bug" in output


def test_the_end_of_the_store_ends_the_ranks_that_it_served() -> None:
    with two_ranks("hang()", "hang()") as (first, second):
        for process in (first, second):
            assert process.stdout is not None and process.stdout.readline() == "hangs\n"
        first.kill()
        output, _ = second.communicate(timeout=120)
        assert second.returncode == 1 and "the process that connected the ranks has ended" in output


def test_a_fault_that_all_ranks_share_unwinds_and_then_they_end_when_they_like() -> None:
    shared = """
try:
    with ending_alone(explain):
        raise SharedFault("all know")
except SharedFault:
    alarm.close()
    print("closed")
    time.sleep(3 * rank)  # the store ends with rank 0
"""
    assert outcomes(shared, shared) == [(0, "closed\n"), (0, "closed\n")]


# -------------------------------------------------------------------------------------------------------- lost hosts
# A host that has lost its power or its network: it closes no connection and sends nothing. Stopped is all that it can
# be here, where both are processes of one machine.
WATCHED = """
import os, signal
alarm.close()
alarm._SILENT_SECONDS, alarm._BEAT_SECONDS, alarm._POLL_SECONDS = 3.0, 0.2, 0.1
alarm.listen(store, Hosts(rank, (rank_on("a"), rank_on("b", address="10.0.0.2"))), watch_hosts=True)
time.sleep(2)
"""
STOPS = WATCHED + "print('stops', flush=True); os.kill(os.getpid(), signal.SIGSTOP); hang()"


@pytest.mark.parametrize(
    ("lost", "named"),
    [(1, "host b (rank 1) has sent nothing for "), (0, "host a (rank 0) has not answered for ")],
)
def test_a_host_that_falls_silent_ends_the_run_by_name(lost: int, named: str) -> None:
    bodies = [WATCHED + "hang()", STOPS]
    with two_ranks(*(bodies if lost else bodies[::-1])) as ranks:
        output, _ = ranks[1 - lost].communicate(timeout=120)
    assert ranks[1 - lost].returncode == 1
    assert f"[rank {1 - lost}] {named}" in output and "it has died or lost its network; ending this rank" in output


def test_a_host_that_was_stopped_together_with_the_others_is_not_taken_for_dead() -> None:
    lives = WATCHED + "print('on', flush=True)\ntime.sleep(5)\nprint('lived', flush=True)\nalarm.close()\ntime.sleep(2)"
    with two_ranks(lives, lives) as ranks:
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline() == "on\n"
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in ranks:
                process.send_signal(number)
            time.sleep(4)
        for process in ranks:
            assert process.communicate(timeout=120)[0] == "lived\n" and process.returncode == 0


def test_a_host_whose_ranks_have_left_is_not_missed() -> None:
    stays = WATCHED + "time.sleep(5)\nprint('stayed')\nalarm.close()\ntime.sleep(1)"
    leaves = WATCHED + "alarm.close()\ntime.sleep(1)"
    assert outcomes(stays, leaves) == [(0, "stayed\n"), (0, "")]


def test_a_connection_that_breaks_is_named_by_the_host_at_its_other_end() -> None:
    breaks = (
        WATCHED
        + """
with ending_alone(explain):
    raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:1234")
"""
    )
    (code, output), (other_code, other) = outcomes(breaks, WATCHED + "hang()")
    assert code == 1 and "Traceback" in output
    assert "[rank 0] the connection to host b (rank 1) is gone: that host or its processes have ended" in output
    assert other_code == 1 and "rank 0 on a has ended (the connection to host b (rank 1) is gone" in other


# ----------------------------------------------------------------------------------------------- a rank without others
def test_a_single_rank_unwinds_with_the_message() -> None:
    def explain(error: BaseException) -> UserError | None:
        return UserError("take less") if isinstance(error, MemoryError) else None

    with pytest.raises(UserError, match="take less"), ending_alone(explain):
        raise MemoryError
    with pytest.raises(ZeroDivisionError), ending_alone(explain):
        raise ZeroDivisionError
    with pytest.raises(SharedFault), ending_alone(explain):
        raise SharedFault("all know")
