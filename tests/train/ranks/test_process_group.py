"""Ranks that join: timeouts that leave the word to the stall watch, groups, messages where they don't meet."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from bagel_ds.train.ranks import process_group
from bagel_ds.train.ranks.hosts import Hosts
from bagel_ds.train.ranks.launcher import LauncherProcess, read_launch
from bagel_ds.train.ranks.process_group import collective_timeout
from tests.launch import cpu_environment, free_port
from tests.train.ranks.rank_info import rank_on


@pytest.mark.parametrize(
    ("stall_timeout", "seconds"),
    [(3600, 3660), (541, 601), (540, 600), (539, 600), (10, 600), (0, 24 * 24 * 3600), (1e9, 24 * 24 * 3600)],
)
def test_collective_calls_outlast_the_stall_watch(stall_timeout: float, seconds: float) -> None:
    assert collective_timeout(stall_timeout) == timedelta(seconds=seconds)


_JOINS = """
import ctypes, json, os, re, sys
from pathlib import Path
from bagel_ds.train.ranks import process_group
from bagel_ds.train.ranks.hosts import Threads
from bagel_ds.train.ranks.launcher import read_launch
process_group.threads_of = lambda *_: Threads(3, "as a test says")  # no number that a library would choose
joined = process_group.join_ranks(read_launch(os.environ), stall_timeout=1800)
import deepspeed, torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from bagel_ds.train.ranks import agreement
from deepspeed.ops.op_builder import CPUAdamBuilder

def timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

CPUAdamBuilder().load()
openmp = sorted(set(re.findall(r"/\\S*libgomp\\S*", Path("/proc/self/maps").read_text())))
print(json.dumps({
    "world": timeout(dist.group.WORLD),
    "deepspeed": timeout(deepspeed.comm.new_group([0])),
    "control": timeout(agreement.control_group()),
    "of its own": agreement.control_group() is not dist.group.WORLD,
    "nccl": distributed_c10d._get_default_timeout("nccl").total_seconds(),
    "local": [os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")],
    "openmp": [ctypes.CDLL(library).omp_get_max_threads() for library in openmp],
    "torch": torch.get_num_threads(),
    "environment": os.environ["OMP_NUM_THREADS"],
    "notes": joined.notes,
}))
"""


def test_a_rank_that_joins_sets_timeouts_threads_and_its_place() -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = cpu_environment(RANK="0", WORLD_SIZE="1", **meeting)
    del environment["OMP_NUM_THREADS"]
    command = [sys.executable, "-c", _JOINS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert {found[name] for name in ("world", "deepspeed", "control", "nccl")} == {1860.0}, found
    assert found["of its own"] and found["local"] == ["0", "1", "1"]
    # DeepSpeed's Adam may bring an OpenMP of its own beside torch's, which reads the environment.
    assert found["torch"] == 3 and found["openmp"] and set(found["openmp"]) == {3}, found
    assert found["environment"] == "3"
    assert "1 rank(s), started by a launcher that sets RANK and WORLD_SIZE, on 1 host(s)" in found["notes"][0]
    assert found["notes"][1] == "3 thread(s) per rank for work on the CPU: as a test says"


# ---------------------------------------------------------------------------------------------------------- meeting
@pytest.fixture
def launch_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A launch of two ranks that meet at a port, one of which is this process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards

    def launch(rank: int, port: int) -> Any:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return read_launch({"RANK": str(rank), "WORLD_SIZE": "2", **where})

    return launch


def test_ranks_of_mpirun_ask_mpi_where_to_meet(launch_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed does; rank 0 tells the others its address."""

    class World:
        def Get_rank(self) -> int:
            return 1

        def Get_size(self) -> int:
            return 2

        def bcast(self, _: Any, root: int) -> str:
            return "10.1.1.1"

        def allgather(self, name: str) -> list[str]:
            return ["one", name]

    mpi = SimpleNamespace(COMM_WORLD=World(), Get_processor_name=lambda: "two")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))  # type: ignore[arg-type]
    monkeypatch.setenv("LOCAL_RANK", "")
    found = process_group._with_address(dataclasses.replace(launch_of(1, 4000), address=None))
    assert (found.rank, found.world_size, found.local_rank, found.address, found.port) == (1, 2, 0, "10.1.1.1", 4000)


# ----------------------------------------------------------------------------------------------- GPUs that were dropped
@pytest.mark.parametrize(
    ("wanted", "given", "words", "warned"),
    [
        ("2,3", "0,1", "--num_gpus 2", "--include localhost:2,3"),
        ("4, 5, 6", "0,1", "--num_gpus 2", "--include localhost:4,5"),
        ("GPU-8932f937,GPU-12ab", "0,1", "--num_gpus 2", "--include localhost:NUMBERS (those of nvidia-smi)"),
        ("2,3", "2,3", "", None),
        ("0,1,2,3", "0,1", "--num_gpus 2", None),
        ("2,3", "0,1", "--include localhost:0,1", None),
        ("", "0,1", "--num_gpus 2", None),
        (None, "0,1", "--num_gpus 2", None),
    ],
)
def test_gpus_that_deepspeed_has_dropped_are_a_warning_with_the_line_to_pass(
    wanted: str | None, given: str, words: str, warned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    hosts = Hosts(0, (rank_on("a"), rank_on("a")))
    warnings = process_group._hidden_gpus(hosts, LauncherProcess(environment, ["deepspeed", *words.split()]))
    assert len(warnings) == (warned is not None)
    if warned is not None:
        assert warned in warnings[0] and f"on GPU {given}" in warnings[0]


def test_a_launcher_that_can_not_be_asked_is_no_reason_to_warn() -> None:
    assert process_group._hidden_gpus(Hosts(0, (rank_on("a"),)), None) == []
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "2,3"
