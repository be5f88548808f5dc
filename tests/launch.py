"""Starts real `deepspeed` launches on CPU for tests: bounded in time, cleaned up after.

One that does not end in time is ended with the stacks of all its processes in its output. They are found by a word in
their environment, which whatever they start inherits: ranks run in sessions of their own, workers in a server's.
"""

from __future__ import annotations

import glob
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = REPOSITORY / "launch" / "train.py"
LAUNCH = "BAGEL_TEST_LAUNCH"  # in the environment of every process of a launch
SHOWN = 40_000  # characters of the output of a launch that went wrong


class Finished(NamedTuple):
    code: int
    output: str  # stdout and stderr together


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a CPU launch; DeepSpeed's compiled ops are shared by all tests."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    base = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": cache, "PYTHONFAULTHANDLER": "1"}
    return {
        **os.environ,
        **base,
        "PYTHONPATH": python_path,
        "PATH": binaries,
        "TOKENIZERS_PARALLELISM": "false",
        LAUNCH: uuid.uuid4().hex,
        **extra,
    }


def deepspeed_command(script: Path, arguments: Sequence[object], ranks: int, port: int) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*launcher, str(script), *map(str, arguments)]


def deepspeed(
    script: Path, arguments: Sequence[object], ranks: int, timeout: float = 900, env: Mapping[str, str] | None = None
) -> Finished:
    """Run `deepspeed --num_gpus <ranks> script arguments` to its end."""
    port = free_port()
    return run_to_end(deepspeed_command(script, arguments, ranks, port), cpu_environment(**(env or {})), port, timeout)


def run_ranks(
    script: Path, words: Sequence[object], ranks: int, timeout: float = 900, env: Mapping[str, str] | None = None
) -> Finished:
    """Run `script` on so many ranks without the launcher, which imports torch twice before it starts them.

    The first that fails ends the others, and its exit code is returned.
    """
    port = free_port()
    meeting = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = cpu_environment(**meeting, **(env or {}))
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        started = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, words)],
                cwd=REPOSITORY,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in range(ranks)
        ]
        try:
            while True:
                codes = [process.poll() for process in started]
                late = time.monotonic() > deadline
                if late or any(codes) or None not in codes:
                    break
                time.sleep(0.05)
            if late:
                end_with_stacks(environment[LAUNCH])
        finally:
            for rest in processes_of(environment[LAUNCH]):
                with suppress(psutil.NoSuchProcess):
                    rest.kill()
            for process in started:
                process.wait()
            remove_shared_memory(port)
        log.seek(0)
        output = log.read()
    assert not late, f"no end after {timeout} s; the last of its output:\n{output[-SHOWN:]}"
    return Finished(next(filter(None, codes), 0), output)


def run_to_end(
    command: Sequence[str], environment: Mapping[str, str], port: int, timeout: float, cwd: Path = REPOSITORY
) -> Finished:
    """Run a command, in an environment of `cpu_environment`, whose ranks meet at `port`; ends it after `timeout` s."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_with_stacks(environment[LAUNCH])
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s; the last of its output:\n{output[-SHOWN:]}") from None
    finally:
        remove_shared_memory(port)
    return Finished(process.returncode, output)


def processes_of(launch: str) -> list[psutil.Process]:
    """All that is left of a launch, but for zombies."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH) == launch and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has just ended, or is somebody else's
            continue
    return found


def end_with_stacks(launch: str) -> None:
    """End every process of a launch; each prints its Python stacks, as PYTHONFAULTHANDLER has it do."""
    for process in processes_of(launch):
        try:
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
            for number in (signal.SIGABRT, signal.SIGCONT):
                process.send_signal(number)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    deadline = time.monotonic() + 10
    while processes_of(launch) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes_of(launch):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def free_port() -> int:
    """Below those that the kernel gives to outgoing connections, one of which might take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as server:
            try:
                server.bind(("", port))
            except OSError:
                continue
        return port


def shared_memory(port: int) -> list[Path]:
    """What DeepSpeed has in /dev/shm for CPU runs whose ranks meet at `port`."""
    return [Path(name) for name in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*")]


def remove_shared_memory(port: int) -> None:
    """DeepSpeed leaves 66 MiB per rank in /dev/shm after a CPU run, where the trainer has not seen to it."""
    for path in shared_memory(port):
        path.unlink(missing_ok=True)
