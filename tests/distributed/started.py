"""A real launch that goes on while a test does something to it: its processes, its output, its end.

Other runs on the machine are never touched. Leaving the `with` block ends all that is left of the run; a wait that is
given up ends it with the stacks of all its processes in its output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.launch import (
    LAUNCH,
    REPOSITORY,
    SHOWN,
    TRAIN,
    cpu_environment,
    deepspeed_command,
    end_with_stacks,
    free_port,
    processes_of,
    remove_shared_memory,
)

FAULTY = Path(__file__).with_name("faulty_train.py")
PATIENCE = 300.0  # seconds, on a busy machine
ENDING = 60.0  # in which all that is left of a run must have ended


class StartedRun:
    """`deepspeed --num_gpus <ranks> train.py words`, with `faults` as in faulty_train.py and `more` environment."""

    def __init__(
        self,
        words: Sequence[str],
        results: Path,
        ranks: int = 2,
        faults: Sequence[dict[str, Any]] = (),
        env: Mapping[str, str] | None = None,
    ):
        self.results, self.port = results, free_port()
        results.mkdir(parents=True, exist_ok=True)
        self._log = results / f"launch-{self.port}.txt"
        script, extra = (FAULTY, {"BAGEL_TEST_FAULTS": json.dumps(list(faults))}) if faults else (TRAIN, {})
        environment = cpu_environment(**extra, **(env or {}))
        self._launch = environment[LAUNCH]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                deepspeed_command(script, words, ranks, self.port),
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes():
            _send(process.pid, signal.SIGKILL)
        self.process.wait()
        remove_shared_memory(self.port)

    # ----------------------------------------------------------------------------------------------- what can be seen
    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that is left of the run, but for zombies."""
        return processes_of(self._launch)

    def launcher(self) -> int:
        """DeepSpeed's per-host launcher."""
        return next(p.pid for p in self.processes() if _holds(lambda p: "deepspeed.launcher.launch" in p.cmdline(), p))

    def waiting(self) -> list[int]:
        """By rank, the processes that the launcher started."""
        return self._by_rank(lambda process: process.ppid() == self.launcher())

    def ranks(self) -> list[int]:
        """By rank, the processes that train."""
        ours = {p.pid for p in self.processes()}
        command = os.getsid(self.process.pid)
        return self._by_rank(lambda p: p.pid in ours and os.getsid(p.pid) != command and p.ppid() not in ours)

    def workers(self) -> list[int]:
        """Workers of all ranks: what their servers have forked."""
        ranks = set(self.ranks())
        servers = {p.pid for p in self.processes() if _holds(lambda p: p.ppid() in ranks and _is_server(p), p)}
        return [p.pid for p in self.processes() if _holds(lambda p: p.ppid() in servers, p)]

    def _by_rank(self, wanted: Callable[[psutil.Process], bool]) -> list[int]:
        found: dict[int, int] = {}

        def note(process: psutil.Process) -> bool:
            if wanted(process):
                found[int(process.environ()["RANK"])] = process.pid
            return True

        for process in self.processes():
            _holds(note, process)
        return [found[rank] for rank in sorted(found)]

    # ------------------------------------------------------------------------------------------- what is waited for
    def until(self, condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
        """Wait until `condition`, which must come before the run ends."""
        deadline = time.monotonic() + patience
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output[-4000:]}"
            if time.monotonic() > deadline:
                end_with_stacks(self._launch)
                raise AssertionError(f"no {what} in {patience:.0f} s:\n{self.output[-SHOWN:]}")
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Wait until the metrics of `step` are written, in this launch or an earlier one."""
        self.until(lambda: step in steps_logged(self.results), f"step {step}")

    def end(self, patience: float = PATIENCE) -> int:
        """Wait for the end of the launcher and of all that it started; the launcher's exit code."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            end_with_stacks(self._launch)
            raise AssertionError(f"no end in {patience:.0f} s:\n{self.output[-SHOWN:]}") from None
        self.all_ended()
        return code

    def all_ended(self, patience: float = ENDING) -> None:
        """Wait until nothing of the run is left."""
        deadline = time.monotonic() + patience
        while left := self.processes():
            if time.monotonic() > deadline:
                names = [f"{p.pid} {p.cmdline()}" for p in left if p.is_running()]
                end_with_stacks(self._launch)
                raise AssertionError(f"still there after {patience:.0f} s: {names}\n{self.output[-SHOWN:]}")
            time.sleep(0.1)


def steps_logged(results: Path) -> list[int]:
    file = results / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        _send(pid, number)


def _is_server(process: psutil.Process) -> bool:
    return "bagel_ds.processes" in process.cmdline()


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _holds(wanted: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    """Whether it is so of a process that may end at any moment."""
    try:
        return wanted(process)
    except (psutil.NoSuchProcess, ProcessLookupError, StopIteration):
        return False
