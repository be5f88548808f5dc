"""Starts real `deepspeed` launches on CPU for tests: bounded in time, killed as a group, cleaned up after."""

from __future__ import annotations

import glob
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = REPOSITORY / "launch" / "train.py"


class Finished(NamedTuple):
    code: int
    output: str  # stdout and stderr together


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a CPU launch; DeepSpeed's compiled ops are shared by all tests."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    base = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": cache}
    return {
        **os.environ,
        **base,
        "PYTHONPATH": python_path,
        "PATH": binaries,
        "TOKENIZERS_PARALLELISM": "false",
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


def run_to_end(command: Sequence[str], environment: Mapping[str, str], port: int, timeout: float) -> Finished:
    """Run a command whose ranks meet at `port`; past `timeout` seconds its process group is killed."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
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
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s; the last of its output:\n{output[-4000:]}") from None
    finally:
        remove_shared_memory(port)
    return Finished(process.returncode, output)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def shared_memory(port: int) -> list[Path]:
    """What DeepSpeed has in /dev/shm for CPU runs whose ranks meet at `port`."""
    return [Path(name) for name in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*")]


def remove_shared_memory(port: int) -> None:
    """DeepSpeed leaves 66 MiB per rank in /dev/shm after a CPU run, where the trainer has not seen to it."""
    for path in shared_memory(port):
        path.unlink(missing_ok=True)
