"""This process's rank, world size and meeting point, as its launcher sets them.

Guarantees: only this file reads launchers' variables. `deepspeed`, torchrun, plain RANK and WORLD_SIZE (a PyTorchJob
pod), OpenMPI, MPICH, Intel MPI, MVAPICH and srun all work; one message names what is missing. `launcher_process` finds
the environment that the user's shell had set before the launcher changed it.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.train.process.detach import is_deepspeed, parent_of

_PORT = 29500  # torch's and DeepSpeed's default
_ANCESTORS = 16  # to look at for a launcher


class _Variables(NamedTuple):
    """The variables of one launcher; of several names the first that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_PLAIN = _Variables(
    "a launcher that sets RANK and WORLD_SIZE",
    ("RANK",),
    ("WORLD_SIZE",),
    ("LOCAL_RANK",),
    ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
)
_SLURM = _Variables(
    "Slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",), ()
)
# In this order: mpirun may run inside a Slurm job, and either of them may start torchrun or `deepspeed`.
_LAUNCHERS = (
    _PLAIN,
    _Variables(
        "OpenMPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Variables(
        "MVAPICH",
        ("MV2_COMM_WORLD_RANK", "MVP_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_RANK"),
        ("MV2_COMM_WORLD_LOCAL_SIZE", "MVP_COMM_WORLD_LOCAL_SIZE"),
    ),
    _Variables(
        "MPICH or Intel MPI",
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    _SLURM,
)


@dataclass(frozen=True)
class Launch:
    """This process's place according to its launcher; None for what the launcher leaves out."""

    rank: int
    world_size: int
    local_rank: int | None  # also the number of its GPU
    local_size: int | None  # ranks on this host
    address: str | None  # of rank 0
    port: int
    launcher: str

    @property
    def by_mpi(self) -> bool:
        return self.launcher not in (_PLAIN.launcher, _SLURM.launcher, "torchrun", "deepspeed")

    def environment(self) -> dict[str, str]:
        """The variables through which torch and DeepSpeed find the other ranks."""
        assert self.address is not None
        names = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "MASTER_ADDR": self.address}
        return {name: str(value) for name, value in {**names, "MASTER_PORT": self.port}.items()}


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Raises `UserError` if no launcher has started this process, or one has left out what is needed."""
    if "RANK" in environ and "WORLD_SIZE" not in environ:
        raise UserError("RANK is set and WORLD_SIZE is not: set WORLD_SIZE to the number of ranks, the same on each")
    found = [_read(names, environ) for names in _LAUNCHERS]
    said = [place for place in found if place is not None]
    if not said:
        raise UserError(_no_launch(environ))
    first = said[0]
    # Another launcher that gives this process the same place may set what the first leaves out.
    agreeing = [place for place in said if (place.rank, place.world_size) == (first.rank, first.world_size)]
    local_rank = next((place.local_rank for place in agreeing if place.local_rank is not None), None)
    local_size = next((place.local_size for place in agreeing if place.local_size is not None), None)
    if not 0 <= first.rank < first.world_size:
        raise UserError(
            f"rank {first.rank} of {first.world_size} ranks ({first.launcher}): ranks count from 0 and must be fewer"
        )
    by_slurm = any(place.launcher == _SLURM.launcher for place in agreeing)
    address = environ.get("MASTER_ADDR") or _address(first.world_size, local_size, environ if by_slurm else {})
    port = _given_port(environ["MASTER_PORT"]) if "MASTER_PORT" in environ else _port(environ if by_slurm else {})
    return Launch(first.rank, first.world_size, local_rank, local_size, address, port, first.launcher)


def check_address(launch: Launch) -> None:
    """Raise `UserError` if nothing says where the ranks meet and mpi4py can't find out."""
    if launch.address is None and importlib.util.find_spec("mpi4py") is None:
        mpi = " Or install mpi4py." if launch.by_mpi else ""
        raise UserError(
            f"this is one of {launch.world_size} ranks ({launch.launcher}), and nothing says where they meet: set "
            "MASTER_ADDR to the name of rank 0's host, and MASTER_PORT to a free port there, for all of them (`export "
            f"MASTER_ADDR=host1`, or `mpirun -x MASTER_ADDR=host1 ...`).{mpi}"
        )


def _read(names: _Variables, environ: Mapping[str, str]) -> Launch | None:
    """The place that one launcher's variables give; None without a rank and a world size."""
    rank, world_size, local_rank, local_size = (_first(each, environ) for each in names[1:])
    if rank is None or world_size is None:
        return None
    if names is _SLURM:
        local_size = _slurm_tasks_here(environ)
    launcher = _kind_of_plain(environ) if names is _PLAIN else names.launcher
    return Launch(rank, world_size, local_rank, local_size, None, _PORT, launcher)


def _kind_of_plain(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if {"CROSS_RANK", "CROSS_SIZE"} <= environ.keys() else _PLAIN.launcher


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    return next((_number(name, environ) for name in names if environ.get(name)), None)


def _number(name: str, environ: Mapping[str, str]) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} must be a whole number, found {environ[name]!r}") from None


def _no_launch(environ: Mapping[str, str]) -> str:
    for names in _LAUNCHERS:
        if _first(names.rank, environ) is not None:
            return (
                f"{names.launcher} sets this process's rank ({names.rank[0]}) but not the number of ranks: set RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start it with `deepspeed` or torchrun"
            )
    return (
        "no launcher has started this process: use one also for one GPU, as in "
        "`deepspeed --num_gpus 1 launch/train.py --ds_config zero3.json ...`"
    )


# ------------------------------------------------------------------------------------------------- where ranks meet
def _address(world_size: int, local_size: int | None, slurm: Mapping[str, str]) -> str | None:
    if world_size in (1, local_size):
        return "127.0.0.1"
    hosts = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or slurm.get("SLURM_NODELIST")
    return None if not hosts else first_slurm_host(hosts)


def _given_port(named: str) -> int:
    if not (named.isdecimal() and 0 < int(named) < 2**16):
        raise UserError(f"MASTER_PORT (--master_port) {named}: expected a whole number from 1 to 65535, such as 29500")
    return int(named)


def _port(slurm: Mapping[str, str]) -> int:
    """The same on all ranks of a job, and different for jobs that share a node."""
    job = slurm.get("SLURM_JOB_ID", "")
    return 20000 + int(job) % 10000 if job.isdecimal() else _PORT


def first_slurm_host(hosts: str) -> str:
    """The first name in a list such as `gpu[07-09,12],login1` or `rack[1-2]n[1-8]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else hosts)


def _slurm_tasks_here(environ: Mapping[str, str]) -> int | None:
    """From `2(x3),1`, the tasks of each node in order, or from the number requested per node."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if tasks and environ.get("SLURM_NODEID", "").isdecimal():
        nodes: list[int] = []
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
            nodes += [int(count)] * int(times or 1)
        node = int(environ["SLURM_NODEID"])
        if node < len(nodes):
            return nodes[node]
    return _first(("SLURM_NTASKS_PER_NODE",), environ)


# ------------------------------------------------------------------------------------------- the launcher's process
class LauncherProcess(NamedTuple):
    """The launcher command that the user started, with its environment."""

    environment: dict[str, str]
    words: list[str]
    planned: tuple[str, ...] = ()  # each rank's host, as in the hostfile, if the launcher says so

    @property
    def names_gpus(self) -> bool:
        """Whether the `deepspeed` command says which GPUs to use."""
        options = tuple(word.split("=")[0] for word in self.words)
        return any(name in options for name in ("-i", "--include", "-e", "--exclude"))


def launcher_process(environ: Mapping[str, str]) -> LauncherProcess | None:
    """The launcher of this process; None if it is neither `deepspeed` nor torchrun, or can't be read.

    Call it in the process that the launcher started. On the host of the command, `deepspeed` is two processes.
    """
    found, pid, by_torchrun = None, parent_of("self"), "TORCHELASTIC_RUN_ID" in environ
    planned: tuple[str, ...] = ()
    for _ in range(_ANCESTORS):
        if pid <= 1:
            break
        if by_torchrun:
            process = _look_at(pid)
            if process is None or "TORCHELASTIC_RUN_ID" not in process.environment:
                return process
        elif is_deepspeed(pid):
            found = _look_at(pid) or found
            planned = planned or (() if found is None else _planned_hosts(found.words))
        elif found is not None:
            break
        pid = parent_of(pid)
    return None if found is None else found._replace(planned=planned)


def _planned_hosts(words: list[str]) -> tuple[str, ...]:
    """From --world_info, with which `deepspeed` starts its launcher on each host: the GPUs of each host, in order."""
    for word in words:
        name, _, value = word.partition("=")
        if name == "--world_info":
            try:
                world = json.loads(base64.urlsafe_b64decode(value))
                return tuple(host for host, gpus in world.items() for _ in gpus)
            except (ValueError, AttributeError, TypeError):
                return ()  # another version's; names of hosts are only for messages
    return ()


def _look_at(pid: int) -> LauncherProcess | None:
    """A process with the environment it was started in."""
    try:
        entries, words = (
            Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").split("\0")
            for name in ("environ", "cmdline")
        )
    except OSError:
        return None
    return LauncherProcess(dict(entry.split("=", 1) for entry in entries if "=" in entry), words)


class Started(NamedTuple):
    """How this process was started; either `launch` or `fault` is None."""

    launch: Launch | None
    fault: UserError | None
    launcher: LauncherProcess | None

    @property
    def reports(self) -> bool:
        """Whether this rank reports faults common to all ranks."""
        return self.launch is None or self.launch.rank == 0


def started() -> Started:
    """Call it in the process that the launcher started, before anything changes its environment."""
    launcher = launcher_process(os.environ)
    try:
        return Started(read_launch(os.environ), None, launcher)
    except UserError as fault:
        return Started(None, fault, launcher)
