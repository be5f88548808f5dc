"""Joining the ranks: they meet, share out GPUs and threads, and start DeepSpeed's process group.

Guarantees: each rank has its GPU before anything touches one; no collective call gives up before --stall_timeout has
said why; ranks that don't come and a port that is taken are reported in one message. What ranks tell one another goes
over a gloo group of its own (agreement.py), not over NCCL.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from bagel_ds.doctor.environment import (
    SHARED_MEMORY,
    Verdict,
    compiler_finding,
    free_shared_memory,
    shared_memory_size,
)
from bagel_ds.errors import UserError
from bagel_ds.machine.device import uses_cuda
from bagel_ds.train.process.quiet import quiet_start
from bagel_ds.train.ranks import agreement, alarm
from bagel_ds.train.ranks.agreement import SharedFault
from bagel_ds.train.ranks.hosts import Hosts, RankInfo, gpu_of, network_interface, rank_info, threads_of
from bagel_ds.train.ranks.launcher import Launch, LauncherProcess, check_address, read_launch
from bagel_ds.train.ranks.rendezvous import check_meeting_point, let_first_rank_speak, meet
from bagel_ds.units import MIB
from bagel_ds.zero.ops import build
from bagel_ds.zero.shm_buffers import BUFFER_BYTES, SUMS, leave_out_sums, remove_own_buffers, remove_stale_buffers

_LEAST_TIMEOUT = 600.0  # of a collective call; as torch has it for NCCL
_BEHIND_WATCH = 60.0  # the stall watch comes first: it knows where each rank is
_MOST_TIMEOUT = 24 * 24 * 3600.0  # sockets count milliseconds in 31 bits


class Joined(NamedTuple):
    """What the log says of it."""

    notes: list[str]  # on rank 0
    warnings: list[str]  # on rank 0
    of_host: list[str]


def join_ranks(launch: Launch, stall_timeout: float, launcher: LauncherProcess | None = None) -> Joined:
    """Join the ranks that the launcher has started.

    Raises `UserError` where they don't meet, and `SharedFault` where a host has fewer GPUs than ranks.
    """
    if dist.is_initialized():
        return Joined([], [], [])
    check_address(launch)
    launch = _with_address(launch)
    os.environ.update(launch.environment())
    check_meeting_point(launch)
    store, said = meet(launch, json.dumps(rank_info(launch, visible_gpus())))
    hosts = _hosts(launch, said)
    alarm.listen(store, hosts)
    agreement.enter(hosts)
    _take_place(hosts)
    network = _choose_interface(hosts)
    threads = threads_of(hosts, os.environ, None if launcher is None else launcher.environment)
    os.environ["OMP_NUM_THREADS"] = str(threads.number)  # for DeepSpeed's parts, which bring an OpenMP of their own
    torch.set_num_threads(threads.number)
    set_timeouts(collective_timeout(stall_timeout))
    if hosts.local_rank == 0:
        remove_stale_buffers()
    of_host = [] if uses_cuda() else _ready_sums(hosts)
    with quiet_start():
        deepspeed.init_distributed(verbose=False, timeout=collective_timeout(stall_timeout))
    agreement.barrier()  # makes the group, on all ranks
    if not uses_cuda():
        remove_own_buffers()  # all ranks have mapped each other's
    notes = [hosts.describe(launch.launcher), *network, threads.describe()]
    return Joined(notes, _hidden_gpus(hosts, launcher), of_host)


def collective_timeout(stall_timeout: float) -> timedelta:
    """Of collective calls, so that --stall_timeout (0: none) comes first."""
    wanted = max(_LEAST_TIMEOUT, stall_timeout + _BEHIND_WATCH) if stall_timeout > 0 else _MOST_TIMEOUT
    return timedelta(seconds=min(wanted, _MOST_TIMEOUT))


def set_timeouts(timeout: timedelta) -> None:
    """For groups that are made without one, as DeepSpeed makes those of its gradients: torch has no call for it."""
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


# ------------------------------------------------------------------------------------------------------------ meeting
def _with_address(launch: Launch) -> Launch:
    """`launch` with rank 0's address; under mpirun, which does not tell it, from MPI."""
    if launch.address is None:
        deepspeed.comm.comm.mpi_discovery(distributed_port=launch.port, verbose=False)  # sets RANK and the others
        launch = read_launch(os.environ)
    return launch


def _hosts(launch: Launch, said: list[bytes]) -> Hosts:
    """From what every rank says of itself."""
    infos = []
    for content in said:
        values = RankInfo(*json.loads(content))
        infos.append(values._replace(gpus=tuple(values.gpus), cores=tuple(values.cores)))
    return Hosts(launch.rank, tuple(infos))


# ----------------------------------------------------------------------------------------------- GPUs and the network
def visible_gpus() -> tuple[str, ...]:
    """An id of each GPU that this process sees, the same on every rank that sees it; makes no context on any."""
    if not uses_cuda():
        return ()
    return tuple(str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count()))


def _take_place(hosts: Hosts) -> None:
    """Set this rank's GPU and what torch and DeepSpeed read of its place from the environment."""
    device = hosts.local_rank
    if uses_cuda():
        try:
            device = gpu_of(hosts)
        except UserError as fault:
            raise SharedFault(str(fault)) from None
        torch.cuda.set_device(device)
    # DeepSpeed takes LOCAL_RANK for the number of the GPU, and wants the two to be equal.
    names = ["LOCAL_RANK"] + [name for name in ("OMPI_COMM_WORLD_LOCAL_RANK",) if name in os.environ]
    os.environ.update(dict.fromkeys(names, str(device)))
    os.environ.update(dict.fromkeys(("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(len(hosts.here))))


def _choose_interface(hosts: Hosts) -> list[str]:
    """Have gloo use the network that the hosts meet over; a line for the log."""
    if len(hosts.here) == len(hosts.ranks) or "GLOO_SOCKET_IFNAME" in os.environ:
        return []
    interface = network_interface(hosts)
    if interface is None:
        return []
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    return [f"gloo uses the network interface {interface}; GLOO_SOCKET_IFNAME names another"]


def _hidden_gpus(hosts: Hosts, launcher: LauncherProcess | None) -> list[str]:
    """A warning where `deepspeed` has dropped the user's CUDA_VISIBLE_DEVICES, as it does with --num_gpus."""
    if launcher is None or launcher.names_gpus:
        return []
    wanted = launcher.environment.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    if not wanted or set(given.split(",")) <= set(wanted.split(",")):
        return []
    devices = ",".join(wanted.split(",")[: len(hosts.here)])
    numbers = devices if devices.replace(",", "").isdecimal() else "NUMBERS (those of nvidia-smi)"
    host = "localhost" if len(hosts.sizes) == 1 else hosts.ranks[hosts.rank].host
    return [
        f"CUDA_VISIBLE_DEVICES={wanted} has no effect: `deepspeed` drops it where it is given --num_gpus, --num_nodes "
        f"or a hostfile, and this run is on GPU {given or '0 and those after it'}. To train on those that you named, "
        f"take `--include {host}:{numbers}` instead of --num_gpus"
    ]


# --------------------------------------------------------------------------------------------- ranks on the CPU
def _ready_sums(hosts: Hosts) -> list[str]:
    """Have the part that adds up over ranks on the CPU compiled, or left out where it can't be; a note of that."""
    needed = BUFFER_BYTES * len(hosts.here)
    compiler = compiler_finding([SUMS])
    # By the size of /dev/shm, which is the same for every rank; what is free may change from one to the next.
    if compiler.verdict is Verdict.FAULT or shared_memory_size() < needed:
        leave_out_sums()
        small = f"{SHARED_MEMORY} is smaller than the {needed // MIB} MiB of its buffers"
        reason = compiler.text if compiler.verdict is Verdict.FAULT else small
        return [f"ranks add up through gloo, which is slower than DeepSpeed's own way: {reason}"]
    if hosts.local_rank == 0 and free_shared_memory() < needed:
        raise UserError(
            f"{SHARED_MEMORY} is full: {free_shared_memory() // MIB} MiB are free, and ranks on the CPU need "
            f"{needed // MIB} MiB there to add up; remove what lies there, or give a container more (--shm-size)"
        )
    try:
        build([SUMS])
    except UserError:
        let_first_rank_speak(hosts.local_rank == 0)
        raise
    return []
