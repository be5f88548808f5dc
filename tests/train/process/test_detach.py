"""A detached rank: its exit code, signals that reach it, and which process outlives which.

Each case is a small program of its own, as fork and signals do to a process what a test runner must not meet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.train.process.detach import process_state

REPOSITORY = Path(__file__).resolve().parents[3]

# Says its pid in the file "rank", then does what the test wants.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from bagel_ds.train.process.detach import asked_to_stop, end_at_once, run_detached

def rank():
    here = Path({folder!r})
    (here / "rank.new").write_text(f"{{os.getpid()}} {{os.getpgid(0)}} {{os.getsid(0)}}")
    (here / "rank.new").rename(here / "rank")
    {body}

sys.exit(run_detached(rank))
"""

# What a started `python -m deepspeed.launcher.launch` is to the processes it starts.
LAUNCHER = """
import signal, subprocess, sys, time
from pathlib import Path
waiting = subprocess.Popen([sys.executable, sys.argv[1]])
signal.signal(signal.SIGTERM, lambda *_: waiting.terminate())
signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), print("KeyboardInterrupt", flush=True)))
Path(sys.argv[1]).with_name("waiting").write_text(str(waiting.pid))
sys.exit(waiting.wait())
"""


class Program:
    def __init__(self, folder: Path, body: str, launcher: str = ""):
        self.folder, script = folder, folder / "program.py"
        script.write_text(PROGRAM.format(folder=str(folder), body=body.replace("\n", "\n    ")))
        command = [sys.executable, str(script)]
        if launcher:
            (folder / launcher).write_text(LAUNCHER)
            command = [sys.executable, str(folder / launcher), str(script)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        environment.pop("BAGEL_DS_DETACH", None)
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    @property
    def rank(self) -> int:
        _until(lambda: (self.folder / "rank").exists())
        return int((self.folder / "rank").read_text().split()[0])

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output.decode()


def _until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        program.process.kill()
        if (program.folder / "rank").exists() and process_state(program.rank) is not None:
            os.kill(program.rank, signal.SIGKILL)
        program.process.communicate()


WAIT = 'Path({folder!r}, "ready").touch()\ntime.sleep(60)'


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return 2", 2, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('words')", 1, ""),
        ("raise RuntimeError('seen')", 1, "RuntimeError: seen"),
        ("end_at_once(5)", 5, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
    ],
)
def test_the_waiting_process_ends_with_the_ranks_code(
    body: str, code: int, said: str, tmp_path: Path, programs: list[Program]
) -> None:
    programs.append(Program(tmp_path, body))
    found, output = programs[0].end()
    assert found == code and said in output


def test_a_code_that_was_written_before_the_pid_was_read_counts_although_a_thread_still_holds_the_pipe() -> None:
    code = """
import os, subprocess
from bagel_ds.train.process.detach import _wait
ended = subprocess.Popen(["true"])
ended.wait()
read, write = os.pipe()
os.write(write, f"{ended.pid}\\n7\\n".encode())  # and `write` stays open
print(_wait(read, ended.pid, False))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "7\n"


def test_the_rank_is_in_a_session_and_a_group_of_its_own(tmp_path: Path, programs: list[Program]) -> None:
    programs.append(Program(tmp_path, "return 0"))
    programs[0].end()
    _, group, session = (int(word) for word in (tmp_path / "rank").read_text().split())
    assert group == session != os.getsid(0)


@pytest.mark.parametrize(
    ("number", "seen"),
    [(n, n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] + [(signal.SIGHUP, signal.SIGTERM)],
)
def test_signals_reach_the_rank(number: int, seen: int, tmp_path: Path, programs: list[Program]) -> None:
    body = f"signal.signal({seen}, lambda *_: end_at_once(50 + {seen}))\n" + WAIT.format(folder=str(tmp_path))
    programs.append(Program(tmp_path, body))
    _until((tmp_path / "ready").exists)
    time.sleep(0.5)  # the waiting process listens a moment after the rank has begun
    programs[0].process.send_signal(number)
    assert programs[0].end()[0] == 50 + seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_rank_that_does_not_listen_yet_ends_at_once(number: int, tmp_path: Path, programs: list[Program]) -> None:
    programs.append(Program(tmp_path, WAIT.format(folder=str(tmp_path))))
    _until((tmp_path / "ready").exists)
    time.sleep(0.5)
    programs[0].process.send_signal(number)
    code, output = programs[0].end()
    assert code == 128 + number and "nothing was saved" in output


def test_a_stopped_rank_is_woken_by_a_signal(tmp_path: Path, programs: list[Program]) -> None:
    programs.append(Program(tmp_path, WAIT.format(folder=str(tmp_path))))
    rank = programs[0].rank
    time.sleep(0.5)
    os.kill(rank, signal.SIGSTOP)
    _until(lambda: process_state(rank) == "T")
    programs[0].process.send_signal(signal.SIGTERM)
    assert programs[0].end()[0] == 128 + signal.SIGTERM


def test_a_rank_ends_when_its_waiting_process_is_killed(tmp_path: Path, programs: list[Program]) -> None:
    programs.append(Program(tmp_path, WAIT.format(folder=str(tmp_path))))
    rank = programs[0].rank
    programs[0].process.kill()
    _until(lambda: process_state(rank) is None)


def test_a_rank_that_was_asked_to_stop_outlives_its_waiting_process(tmp_path: Path, programs: list[Program]) -> None:
    here = str(tmp_path)
    listen = f"signal.signal(signal.SIGTERM, lambda *_: (asked_to_stop(), Path({here!r}, 'asked').touch()))\n"
    finish = f"\nPath({here!r}, 'saved').touch()\nreturn 0"
    programs.append(Program(tmp_path, listen + WAIT.format(folder=here).replace("60", "3") + finish))
    rank = programs[0].rank
    _until((tmp_path / "ready").exists)
    os.kill(rank, signal.SIGTERM)
    _until((tmp_path / "asked").exists)
    programs[0].process.kill()
    _until((tmp_path / "saved").exists)
    _until(lambda: process_state(rank) is None)


def test_what_a_killed_rank_had_started_ends_with_it(tmp_path: Path, programs: list[Program]) -> None:
    body = (
        f"child = subprocess.Popen(['sleep', '60'])\nPath({str(tmp_path)!r}, 'child.new').write_text(str(child.pid))\n"
    )
    body += f"Path({str(tmp_path)!r}, 'child.new').rename(Path({str(tmp_path)!r}, 'child'))\ntime.sleep(60)"
    programs.append(Program(tmp_path, body))
    _until((tmp_path / "child").exists)
    child = int((tmp_path / "child").read_text())
    os.kill(programs[0].rank, signal.SIGKILL)
    assert programs[0].end()[0] == 137
    _until(lambda: process_state(child) is None)


@pytest.mark.parametrize("launcher", ["deepspeed.py", "another.py"])
def test_after_ctrl_c_the_run_reports_after_the_traceback_of_deepspeeds_launcher(
    launcher: str, tmp_path: Path, programs: list[Program]
) -> None:
    body = "signal.signal(signal.SIGINT, lambda *_: (print('stopping', flush=True), end_at_once(3)))\n"
    programs.append(Program(tmp_path, body + WAIT.format(folder=str(tmp_path)), launcher=launcher))
    _until((tmp_path / "ready").exists)
    time.sleep(0.5)
    os.kill(int((tmp_path / "waiting").read_text()), signal.SIGINT)  # a terminal sends it to both
    programs[0].process.send_signal(signal.SIGINT)
    code, output = programs[0].end()
    assert code == 3 and "KeyboardInterrupt" in output and "stopping" in output
    if launcher == "deepspeed.py":
        assert output.index("KeyboardInterrupt\n") < output.index("not from this run") < output.index("stopping")
    else:
        assert "not from this run" not in output, "no one else prints a traceback then"


def test_a_rank_is_asked_to_stop_when_deepspeeds_launcher_is_gone(tmp_path: Path, programs: list[Program]) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: end_at_once(3))\n" + WAIT.format(folder=str(tmp_path))
    programs.append(Program(tmp_path, body, launcher="deepspeed.py"))
    _until((tmp_path / "ready").exists)
    rank = programs[0].rank
    time.sleep(0.5)
    programs[0].process.kill()
    _until(lambda: process_state(rank) is None)
    assert "the launcher is gone" in programs[0].end()[1]


def test_the_launchers_own_sigterm_after_a_signal_is_no_second_one(tmp_path: Path, programs: list[Program]) -> None:
    """After Ctrl-C it comes up to 30 seconds per rank later, and must not cost the step under way."""
    count = f"Path({str(tmp_path)!r}, str(len(list(Path({str(tmp_path)!r}).glob('[0-9]'))))).touch()"
    body = f"for n in (2, 15): signal.signal(n, lambda *_: {count})\n" + WAIT.format(folder=str(tmp_path))
    programs.append(Program(tmp_path, body, launcher="deepspeed.py"))
    _until((tmp_path / "ready").exists)
    time.sleep(0.5)
    waiting = int((tmp_path / "waiting").read_text())
    os.kill(waiting, signal.SIGINT)
    _until((tmp_path / "0").exists)
    programs[0].process.terminate()
    time.sleep(1.5)
    assert not (tmp_path / "1").exists()
    os.kill(waiting, signal.SIGINT)
    _until((tmp_path / "1").exists)


def test_another_parent_may_go(tmp_path: Path, programs: list[Program]) -> None:
    """As a shell does in which a run was started in the background."""
    programs.append(Program(tmp_path, WAIT.format(folder=str(tmp_path)), launcher="shell.py"))
    _until((tmp_path / "ready").exists)
    rank = programs[0].rank
    time.sleep(0.5)
    programs[0].process.kill()
    time.sleep(2)
    assert process_state(rank) is not None
    os.kill(rank, signal.SIGKILL)


def test_without_detaching_it_runs_right_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from bagel_ds.train.process.detach import run_detached

    monkeypatch.setenv("BAGEL_DS_DETACH", "0")
    here = os.getpid()
    assert run_detached(lambda: 4 if os.getpid() == here else 5) == 4


def test_ranks_are_forked_from_a_process_with_one_thread() -> None:
    """What the launcher starts has imported neither torch nor numpy by then, whose threads must not see a fork."""
    code = "import os, bagel_ds.train.main; print(len(os.listdir('/proc/self/task')))"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert ran.stdout == "1\n", ran.stderr
