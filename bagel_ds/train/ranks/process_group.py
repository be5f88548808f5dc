"""Joining the ranks: they meet, divide GPUs and threads, and start DeepSpeed's process group.

Guarantees: each rank has its GPU before anything touches one. No collective call times out before --stall_timeout has
reported why. Missing ranks and a port that is taken are one message.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from bagel_ds.doctor.environment import Verdict, refuse_faults, sums_finding
from bagel_ds.errors import UserError
from bagel_ds.machine.device import uses_cuda
from bagel_ds.train.process.quiet import quiet_start
from bagel_ds.train.ranks import agreement, alarm
from bagel_ds.train.ranks.agreement import SharedFault
from bagel_ds.train.ranks.hosts import Hosts, RankInfo, gpu_of, network_interface, rank_info, threads_of
from bagel_ds.train.ranks.launcher import Launch, LauncherProcess, check_address, read_launch
from bagel_ds.train.ranks.rendezvous import check_meeting_point, let_first_rank_report, meet
from bagel_ds.zero.ops import build
from bagel_ds.zero.process_group import ask_mpi, start_process_group
from bagel_ds.zero.shm_buffers import SUMS, leave_out_sums, remove_own_buffers, remove_stale_buffers

_LEAST_TIMEOUT = 600.0  # of a collective call; torch's default for NCCL
_BEHIND_WATCH = 60.0  # the stall watch comes first because it knows where each rank is
_MOST_TIMEOUT = 24 * 24 * 3600.0  # sockets count milliseconds in 31 bits


class Joined(NamedTuple):
    """Lines for the log."""

    notes: list[str]  # on rank 0
    warnings: list[str]  # on rank 0
    of_host: list[str]


def join_ranks(launch: Launch, stall_timeout: float, launcher: LauncherProcess | None = None) -> Joined:
    """Join the ranks that the launcher has started.

    Raises `UserError` if they don't meet, and `SharedFault` if a host has fewer GPUs than ranks.
    """
    if dist.is_initialized():
        return Joined([], [], [])
    check_address(launch)
    launch = _with_address(launch)
    os.environ.update(launch.environment())
    check_meeting_point(launch)
    planned = () if launcher is None else launcher.planned
    store, said = meet(launch, json.dumps(rank_info(launch, visible_gpus())), planned)
    hosts = _hosts(launch, said)
    alarm.listen(store, hosts, watch_hosts=stall_timeout > 0)
    agreement.enter(hosts)
    _take_place(hosts)
    network = _choose_interface(hosts)
    threads = threads_of(hosts, os.environ, None if launcher is None else launcher.environment)
    os.environ["OMP_NUM_THREADS"] = str(threads.number)  # for DeepSpeed's ops, which have their own OpenMP
    torch.set_num_threads(threads.number)
    set_timeouts(collective_timeout(stall_timeout))
    if hosts.local_rank == 0:
        remove_stale_buffers()
    of_host = [] if uses_cuda() else _ready_sums(hosts)
    with quiet_start():
        start_process_group(collective_timeout(stall_timeout))
    agreement.barrier()  # makes the group, on all ranks
    if not uses_cuda():
        remove_own_buffers()  # all ranks have mapped each other's
    notes = [hosts.describe(launch.launcher), *network, threads.describe()]
    return Joined(notes, _hidden_gpus(hosts, launcher), of_host)


def collective_timeout(stall_timeout: float) -> timedelta:
    """The timeout of collective calls, so that --stall_timeout (0: none) comes first."""
    wanted = max(_LEAST_TIMEOUT, stall_timeout + _BEHIND_WATCH) if stall_timeout > 0 else _MOST_TIMEOUT
    return timedelta(seconds=min(wanted, _MOST_TIMEOUT))


def set_timeouts(timeout: timedelta) -> None:
    """For groups that are made without a timeout, as DeepSpeed's gradient groups are; torch has no call for it."""
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


# ------------------------------------------------------------------------------------------------------------ meeting
def _with_address(launch: Launch) -> Launch:
    """`launch` with rank 0's address; mpirun does not set it, so MPI is asked."""
    if launch.address is None:
        ask_mpi(launch.port)
        launch = read_launch(os.environ)
    return launch


def _hosts(launch: Launch, said: list[bytes]) -> Hosts:
    """From every rank's message."""
    infos = []
    for content in said:
        values = RankInfo(*json.loads(content))
        infos.append(values._replace(gpus=tuple(values.gpus), cores=tuple(values.cores)))
    return Hosts(launch.rank, tuple(infos))


# ----------------------------------------------------------------------------------------------- GPUs and the network
def visible_gpus() -> tuple[str, ...]:
    """The id of each GPU that this process sees, equal on all ranks that see it. Makes no context on a GPU."""
    if not uses_cuda():
        return ()
    return tuple(str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count()))


def _take_place(hosts: Hosts) -> None:
    """Set this rank's GPU, and its place in the environment for torch and DeepSpeed."""
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
    """Have gloo use the network over which the hosts met; a line for the log."""
    if len(hosts.here) == len(hosts.ranks) or "GLOO_SOCKET_IFNAME" in os.environ:
        return []
    interface = network_interface(hosts)
    if interface is None:
        return []
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    return [f"gloo uses the network interface {interface}; GLOO_SOCKET_IFNAME names another"]


def _hidden_gpus(hosts: Hosts, launcher: LauncherProcess | None) -> list[str]:
    """A warning if `deepspeed` has dropped the user's CUDA_VISIBLE_DEVICES, as it does with --num_gpus."""
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
        f"CUDA_VISIBLE_DEVICES={wanted} has no effect: with --num_gpus, --num_nodes or a hostfile `deepspeed` "
        f"drops it, and this run is on GPU {given or '0 and those after it'}. To train on the GPUs that you named, "
        f"pass `--include {host}:{numbers}` instead of --num_gpus"
    ]


# --------------------------------------------------------------------------------------------- ranks on the CPU
def _ready_sums(hosts: Hosts) -> list[str]:
    """Compile DeepSpeed's op that sums over ranks on the CPU, or do without it; a note for the log."""
    found = sums_finding(len(hosts.here))
    if found.verdict is Verdict.NOTE:
        leave_out_sums()
        return [found.text]
    if hosts.local_rank == 0:
        refuse_faults([found])
    try:
        build([SUMS])
    except UserError:
        let_first_rank_report(hosts.local_rank == 0)
        raise
    return []
