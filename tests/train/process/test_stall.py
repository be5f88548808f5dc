"""The stall watch: what it reports, and when it ends a rank.

What ends a process is shown in a process of its own; how ranks describe one another is shown on made-up ranks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.machine import liveness
from bagel_ds.train.process import stall
from bagel_ds.train.process.detach import process_state
from bagel_ds.train.process.stall import HEARTBEATS, StallWatch, describe, missing

REPOSITORY = Path(__file__).resolve().parents[3]


def beat(step: int, phase: str, silent: float = 0.0) -> dict[str, Any]:
    return {"step": step, "phase": phase, "seconds": 12.0, "host": "one", "pid": 1, "silent": silent}


def program(body: str) -> subprocess.Popen[str]:
    head = f"import sys, time\nfrom pathlib import Path\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
    head += "from bagel_ds.train.process import stall as watch\nfrom bagel_ds.train.process.stall import StallWatch\n"
    command = [sys.executable, "-c", head + body]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ----------------------------------------------------------------------------------------------------- who is missing
def test_ranks_behind_in_data_or_silent_are_missing() -> None:
    ranks = [beat(5, "step"), beat(5, "step", silent=40), beat(4, "after step"), beat(5, "data"), None]
    assert missing(ranks) == ["rank 1", "rank 2", "rank 3", "rank 4"]
    assert missing([beat(5, "step"), beat(5, "step")]) == []


def test_a_rank_that_has_its_data_is_not_missing() -> None:
    assert missing([beat(5, "after data"), beat(5, "step")]) == []


def test_a_rank_is_described_in_a_line() -> None:
    assert describe(3, beat(7, "save")) == "rank 3 on one: step 7, save for 12 s"
    assert describe(3, beat(7, "save", silent=40)).endswith("save for 12 s, silent for 40 s")
    assert describe(3, None) == "rank 3: has written nothing yet"


# -------------------------------------------------------------------------------------------------------- who is ended
def test_a_phase_longer_than_the_timeout_prints_stacks_and_ends_the_process(tmp_path: Path) -> None:
    stalled = program(
        f"""
def stuck_here():
    time.sleep(60)

found = StallWatch(Path({str(tmp_path)!r}), 0, 2, timeout=0.5)
with found.phase(3, "data"):
    stuck_here()
"""
    )
    output, _ = stalled.communicate(timeout=50)
    assert stalled.returncode == 1
    assert "[rank 0] stalled: data of step 3 has taken longer than --stall_timeout 0.5 s" in output
    assert "rank 1: has written nothing yet" in output and "missing: rank 0, rank 1" in output
    assert "in stuck_here" in output and "most recent call first" in output


def test_phases_that_end_in_time_are_left_alone(tmp_path: Path) -> None:
    found = StallWatch(tmp_path, 0, 1, timeout=0.4)
    for step in range(8):
        with found.phase(step, "step"):
            time.sleep(0.1)
    file = tmp_path / HEARTBEATS / "rank_0.json"
    assert json.loads(file.read_text())["phase"] in ("step", "after step")
    found.close()
    assert not (tmp_path / HEARTBEATS).exists()


def test_without_a_timeout_nothing_is_written(tmp_path: Path) -> None:
    found = StallWatch(tmp_path, 0, 1, timeout=0)
    with found.phase(0, "step"):
        pass
    found.close()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_whose_neighbour_has_ended_ends_too(tmp_path: Path) -> None:
    neighbour = subprocess.Popen(["sleep", "60"])
    rank = program(
        f"""
watch._GONE_SECONDS = 0.2
found = StallWatch(Path({str(tmp_path)!r}), 0, 2, timeout=2, neighbors={{1: {neighbour.pid}}})
for step in range(60):
    with found.phase(step, "step"):
        time.sleep(1)
"""
    )
    time.sleep(2)
    assert rank.poll() is None
    neighbour.kill()
    neighbour.wait()
    output, _ = rank.communicate(timeout=50)
    assert rank.returncode == 1
    assert f"rank 1 (process {neighbour.pid}) has ended; ending this rank, too" in output


def test_a_stopped_neighbour_is_woken_and_then_killed(tmp_path: Path) -> None:
    neighbour = subprocess.Popen(["sleep", "60"])
    os.kill(neighbour.pid, signal.SIGSTOP)
    folder = tmp_path / HEARTBEATS
    folder.mkdir()
    (folder / "rank_1.json").write_text(json.dumps(beat(3, "step")))
    os.utime(folder / "rank_1.json", (time.time() - 100, time.time() - 100))
    rank = program(
        f"""
found = StallWatch(Path({str(tmp_path)!r}), 0, 2, timeout=1, neighbors={{1: {neighbour.pid}}})
with found.phase(3, "step"):
    time.sleep(60)
"""
    )
    output, _ = rank.communicate(timeout=50)
    assert rank.returncode == 1 and "missing: rank 1\n" in output
    assert neighbour.wait(10) == -signal.SIGKILL


def test_own_state_is_known_and_that_of_ended_processes_is_none() -> None:
    assert process_state(os.getpid()) in ("R", "S", "D")
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert process_state(ended.pid) is None


def test_a_full_disk_does_not_stop_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stall.Path, "write_text", full)
    found = StallWatch(tmp_path, 0, 1, timeout=0.2)
    time.sleep(0.15)
    found.close()


# ----------------------------------------------------------------------------------------------- the start of a run
def test_without_a_folder_a_rank_that_stalls_prints_its_own_stacks_alone(tmp_path: Path) -> None:
    stalled = program(
        'found = StallWatch(None, 1, 2, timeout=0.5)\nwith found.phase(0, "setup"):\n    time.sleep(60)\n'
    )
    output, _ = stalled.communicate(timeout=50)
    assert stalled.returncode == 1
    assert "[rank 1] stalled: setup of step 0 has taken longer than --stall_timeout 0.5 s" in output
    assert "most recent call first" in output and "missing" not in output and "rank 0" not in output


def test_what_says_that_it_goes_on_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    """And from then on it is watched as before."""
    stalled = program(
        """
from bagel_ds.machine import liveness
found = StallWatch(None, 0, 1, timeout=1.5)
with found.phase(0, "setup"):
    for _ in range(15):
        time.sleep(0.3)
        liveness.going_on()
    with liveness.timed_elsewhere():
        time.sleep(4)
    print("goes on", flush=True)
    time.sleep(60)
"""
    )
    output, _ = stalled.communicate(timeout=50)
    assert output.startswith("goes on\n") and "stalled: setup of step 0" in output
    assert stalled.returncode == 1


def test_a_closed_watch_hears_nothing_and_a_new_one_does(tmp_path: Path) -> None:
    first = StallWatch(None, 0, 1, timeout=100)
    first.close()
    liveness.going_on()
    second = StallWatch(None, 0, 1, timeout=100)
    since = second._since
    first.close()  # a second time, as by the trainer and its caller
    liveness.going_on()
    assert second._since > since
    second.close()


def test_ranks_know_of_each_other_once_they_share_a_folder(tmp_path: Path) -> None:
    found = StallWatch(None, 0, 1, timeout=0.4)
    time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []
    found.goes_on()
    found.share(tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / HEARTBEATS / "rank_0.json").exists() and time.monotonic() < deadline:
        found.goes_on()
        time.sleep(0.05)
    assert (tmp_path / HEARTBEATS / "rank_0.json").exists()
    found.close()
    assert list(tmp_path.iterdir()) == []


def test_a_stalled_rank_has_its_workers_print_their_stacks(tmp_path: Path) -> None:
    stalled = program(
        """
from bagel_ds.processes import start_worker
from tests.processes import worker_functions as functions
worker = start_worker(functions.stay, "stopped", name="data worker 0")
worker.receive()
worker.doing = lambda: "it made a pack"
found = StallWatch(None, 0, 1, timeout=5)
with found.phase(0, "data"):
    time.sleep(60)
"""
    )
    output, _ = stalled.communicate(timeout=100)
    assert "[rank 0] asked for its stacks: data worker 0 (process " in output and "): it made a pack\n" in output
    assert "in stay" in output and "worker_functions.py" in output


# ------------------------------------------------------------------------------------- several ranks that share stderr
_TWO_RANKS = """
import os, threading
rank = int(os.fork() == 0)
exec("def here_in_rank_%d(depth): here(depth - 1) if depth else time.sleep(60)" % rank)
here = globals()["here_in_rank_%d" % rank]
for _ in range(60):
    threading.Thread(target=here, args=(40,), daemon=True).start()
time.sleep(1 - time.time() % 1)
"""


def test_stacks_of_ranks_that_stall_in_the_same_moment_do_not_mix() -> None:
    stalled = program(
        _TWO_RANKS
        + """
found = StallWatch(None, rank, 2, timeout=1)
with found.phase(0, "data"):
    time.sleep(60)
"""
    )
    output, _ = stalled.communicate(timeout=100)
    turns = [int(number) for number in re.findall(r"in here_in_rank_(\d)\n", output)]
    half = 60 * 41
    assert len(turns) == 2 * half, "each thread's stack is whole"
    assert turns in ([0] * half + [1] * half, [1] * half + [0] * half)


def test_a_rank_does_not_wait_for_ever_for_its_turn() -> None:
    stalled = program(
        """
import fcntl, os, signal
ready, done = os.pipe()
holder = os.fork()
if holder == 0:
    fcntl.lockf(2, fcntl.LOCK_EX)
    os.write(done, b"x")
    os.kill(os.getpid(), signal.SIGSTOP)
os.read(ready, 1)
print(holder, flush=True)
found = StallWatch(None, 0, 1, timeout=1)
with found.phase(0, "data"):
    time.sleep(60)
"""
    )
    assert stalled.stdout is not None
    holder = int(stalled.stdout.readline())
    assert "stalled: data of step 0" in stalled.stdout.readline()
    os.kill(holder, signal.SIGKILL)
    stalled.communicate(timeout=100)
    assert stalled.returncode == 1
