"""Joining the ranks: they meet, share out GPUs and threads, and start DeepSpeed's process group.

Guarantees: each rank has its GPU before anything touches one; no collective call gives up before --stall_timeout has
said why; ranks that don't come and a port that is taken are reported in one message. What ranks tell one another goes
over a gloo group of its own (agreement.py), not over NCCL.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from bagel_ds.errors import UserError
from bagel_ds.train import agreement, alarm
from bagel_ds.train.agreement import SharedFault
from bagel_ds.train.hosts import Hosts, RankInfo, gpu_of, network_interface, rank_info, threads_of
from bagel_ds.train.launcher import Launch, LauncherProcess, check_address, read_launch
from bagel_ds.train.quiet import quiet_start
from bagel_ds.zero.builds import remove_stale_locks
from bagel_ds.zero.shared_memory import remove_own_buffers, remove_stale_buffers

logger = logging.getLogger("bagel_ds")

_MEET_SECONDS = 600.0  # for all ranks to be started
_TELL_SECONDS = 15.0  # of waiting for them before a line says so
_LEAST_TIMEOUT = 600.0  # of a collective call; as torch has it for NCCL
_BEHIND_WATCH = 60.0  # the stall watch comes first: it knows where each rank is
_MOST_TIMEOUT = 24 * 24 * 3600.0  # sockets count milliseconds in 31 bits


class Joined(NamedTuple):
    """What the log says of it on rank 0."""

    notes: list[str]
    warnings: list[str]


def join_ranks(launch: Launch, stall_timeout: float, launcher: LauncherProcess | None = None) -> Joined:
    """Join the ranks that the launcher has started.

    Raises `UserError` where they don't meet, and `SharedFault` where a host has fewer GPUs than ranks.
    """
    if dist.is_initialized():
        return Joined([], [])
    check_address(launch)
    launch = _with_address(launch)
    os.environ.update(launch.environment())
    with _met(launch) as store:
        hosts = _exchange(store, launch)
    alarm.listen(store, hosts)
    agreement.enter(hosts)
    _take_place(hosts)
    network = _choose_interface(hosts)
    threads = threads_of(hosts, os.environ, None if launcher is None else launcher.environment)
    os.environ["OMP_NUM_THREADS"] = str(threads.number)  # for DeepSpeed's parts, which bring an OpenMP of their own
    torch.set_num_threads(threads.number)
    set_timeouts(collective_timeout(stall_timeout))
    remove_stale_locks()
    if hosts.local_rank == 0:
        remove_stale_buffers()
    with quiet_start():
        deepspeed.init_distributed(verbose=False, timeout=collective_timeout(stall_timeout))
    agreement.barrier()  # makes the group, on all ranks
    if deepspeed.get_accelerator().device_name() == "cpu":
        remove_own_buffers()  # all ranks have mapped each other's
    return Joined([hosts.describe(launch.launcher), *network, threads.describe()], _hidden_gpus(hosts, launcher))


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


@contextmanager
def _met(launch: Launch) -> Iterator[dist.Store]:
    """The store that all ranks have come to; on rank 0 it lives in this process and goes on to serve torch."""
    where = f"{launch.address}:{launch.port}"
    waits_for = f"the other {launch.world_size - 1} rank(s)" if launch.rank == 0 else f"rank 0 at {where}"
    done = threading.Event()
    teller = threading.Thread(target=_tell_of_waiting, args=(f"rank {launch.rank} waits for {waits_for}", done))
    teller.daemon = True
    teller.start()
    # A client that finds no one tries twice.
    patience = timedelta(seconds=_MEET_SECONDS / (1 if launch.rank == 0 else 2))
    try:
        store = next(dist.rendezvous("env://", timeout=patience))[0]
        # torchrun's own store may outlive its ranks, which it starts again with --max_restarts.
        yield dist.PrefixStore(f"bagel_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(_why_not_met(launch, where, str(error))) from None
    finally:
        done.set()


def _tell_of_waiting(what: str, done: threading.Event) -> None:
    began = time.monotonic()
    while not done.wait(_TELL_SECONDS):
        print(f"{what}, for {time.monotonic() - began:.0f} s now", flush=True)


def _why_not_met(launch: Launch, where: str, error: str) -> str:
    if "address already in use" in error:
        return (
            f"port {launch.port} of this host is taken, most often by another run: pass a free one as --master_port to "
            "`deepspeed` or torchrun, or as MASTER_PORT to what else starts the ranks"
        )
    said = " ".join(error.split("\n")[0].split())
    return (
        f"the {launch.world_size} ranks of this launch ({launch.launcher}) did not meet at {where}: {said} See that "
        "all are started, on every host, that MASTER_ADDR is rank 0's host and that no firewall closes MASTER_PORT."
    )


def _exchange(store: dist.Store, launch: Launch) -> Hosts:
    """What every rank says of itself."""
    own = json.dumps(rank_info(launch, visible_gpus()))
    store.set(_key(launch.rank), own)
    found = store.multi_get([_key(rank) for rank in range(launch.world_size)])
    infos = []
    for content in found:
        values = RankInfo(*json.loads(content))
        infos.append(values._replace(gpus=tuple(values.gpus), cores=tuple(values.cores)))
    return Hosts(launch.rank, tuple(infos))


def _key(rank: int) -> str:
    return f"rank/{rank}"


# ----------------------------------------------------------------------------------------------- GPUs and the network
def on_gpus() -> bool:
    """Whether ranks compute on NVIDIA GPUs."""
    return deepspeed.get_accelerator().device_name() == "cuda" and torch.cuda.is_available()


def visible_gpus() -> tuple[str, ...]:
    """An id of each GPU that this process sees, the same on every rank that sees it; makes no context on any."""
    if not on_gpus():
        return ()
    return tuple(str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count()))


def _take_place(hosts: Hosts) -> None:
    """Set this rank's GPU and what torch and DeepSpeed read of its place from the environment."""
    device = hosts.local_rank
    if on_gpus():
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
