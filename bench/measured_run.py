"""One real `deepspeed` launch of the trainer, on CPU unless told otherwise, with the memory of each phase.

Guarantees: bounded in time, killed as a group, DeepSpeed's leftovers in /dev/shm removed. Phases are those of
marked_train.py: start (imports, plan), load, loaded, step, export, end.
"""

from __future__ import annotations

import glob
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

from bench.measure import MemorySampler, Peak

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """What a launch used. `held` are bytes of live tensors by rank, after loading and before the first step."""

    code: int
    seconds: float
    peaks: dict[str, Peak]
    held: list[int]
    output: str

    def peak(self, *phases: str) -> int:
        """Largest host memory over these phases, bytes over all processes."""
        return max(self.peaks[phase].host for phase in phases)


def measured_run(
    arguments: Sequence[object],
    ranks: int = 2,
    timeout: float = 1800,
    interval: float = 0.1,
    script: str = "marked_train.py",
    until: str | None = None,
    device: str = "cpu",
    environment: Mapping[str, str] | None = None,
) -> Measured:
    """Run a script of this folder (by default the trainer with marks) under the launcher to its end.

    Where that phase begins, a run is killed that is measured `until` then; its code is 0. `device` is "cpu" or "cuda".
    """
    port = _free_port()
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]
    command = [*launcher, str(REPOSITORY / "bench" / script), *map(str, arguments)]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**_environment(device), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    clock = threading.Timer(timeout, lambda: os.killpg(process.pid, signal.SIGKILL))
    clock.start()
    lines: list[str] = []
    held: dict[int, int] = {}
    was_enough = False
    try:
        with MemorySampler(process.pid, interval) as sampler:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                words = line.split()
                if words[:1] == ["MARK"]:
                    sampler.phase = words[1]
                    if words[1] == until:
                        was_enough = True
                        os.killpg(process.pid, signal.SIGKILL)
                elif words[:1] == ["HELD"]:
                    held[int(words[1])] = int(words[2])
            process.wait()
    finally:
        clock.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        for path in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"):
            Path(path).unlink(missing_ok=True)
    return Measured(
        0 if was_enough else process.returncode,
        time.monotonic() - began,
        sampler.peaks,
        [held[rank] for rank in sorted(held)],
        "".join(lines),
    )


def _environment(device: str) -> dict[str, str]:
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    return {
        **os.environ,
        "DS_ACCELERATOR": device,
        "BAGEL_DS_DETACH": "0",  # ranks stay below the launcher, where the sampler finds them
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": cache,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
