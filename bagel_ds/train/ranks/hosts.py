"""Which ranks run on which hosts, as the ranks themselves find out, and each rank's share of its host.

Guarantees: ranks are neighbors if they see each other's processes, whatever their launcher says. All ranks have the
same picture. No two ranks get the same GPU, also if each sees only its own. CPU threads are divided, as the log says.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from math import gcd
from pathlib import Path
from typing import NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.train.ranks.launcher import Launch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # drawn by each kernel at its start
_PROCESSES = Path("/proc/self/ns/pid")  # containers on one machine may share its host name, but not their processes
# As cgroups write it: version 2 "quota period" or "max period", version 1 only the quota, or -1.
_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
_NAMED_HOSTS = 8  # in the log


class RankInfo(NamedTuple):
    """What each rank sends to the others first."""

    host: str
    kernel: str  # "" if unknown
    processes: str
    pid: int
    local_rank: int | None  # as its launcher says
    local_size: int | None
    address: str  # of its host on the route to rank 0; "" if unknown
    gpus: tuple[str, ...]  # that it sees
    cores: tuple[int, ...]  # that it may run on

    @property
    def place(self) -> tuple[str, str, str]:
        """Equal for ranks that see each other's processes."""
        return self.host, self.kernel, self.processes


def rank_info(launch: Launch, gpus: tuple[str, ...]) -> RankInfo:
    """The `RankInfo` of this process."""
    try:
        processes = os.readlink(_PROCESSES)
    except OSError:
        processes = ""
    return RankInfo(
        host=socket.gethostname(),
        kernel=_content(_BOOT_ID),
        processes=processes,
        pid=os.getpid(),
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        address=own_address(launch.address or "", launch.port),
        gpus=gpus,
        cores=tuple(sorted(os.sched_getaffinity(0))),
    )


@dataclass(frozen=True)
class Hosts:
    """All ranks, in order, from the point of view of `rank`."""

    rank: int
    ranks: tuple[RankInfo, ...]

    @property
    def here(self) -> list[int]:
        """The ranks of this host, including this one."""
        return [rank for rank, info in enumerate(self.ranks) if info.place == self.ranks[self.rank].place]

    @property
    def local_rank(self) -> int:
        """This rank's index among the ranks of its host."""
        return self.here.index(self.rank)

    @property
    def local_size(self) -> int:
        """Ranks on this host. Containers don't see each other's processes, so the launcher may know of more."""
        return max(len(self.here), self.ranks[self.rank].local_size or 1)

    @property
    def neighbors(self) -> dict[int, int]:
        """Process ids of the other ranks of this host."""
        return {rank: self.ranks[rank].pid for rank in self.here if rank != self.rank}

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks by host name."""
        return dict(Counter(info.host for info in self.ranks))

    @property
    def group(self) -> int:
        """The largest group size that divides the ranks, in order, into groups that each lie on one host."""
        runs = [len(list(run)) for _, run in groupby(info.place for info in self.ranks)]
        return reduce(gcd, runs)

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks run under one kernel, so that they see each other's writes at once; False if in doubt."""
        kernels = {info.kernel for info in self.ranks}
        return len(self.ranks) == 1 or (len(kernels) == 1 and "" not in kernels)

    def describe(self, launcher: str) -> str:
        """A line for the log."""
        shown = [f"{host}: {count}" for host, count in list(self.sizes.items())[:_NAMED_HOSTS]]
        more = ", ..." if len(self.sizes) > _NAMED_HOSTS else ""
        return (
            f"{len(self.ranks)} rank(s), started by {launcher}, on {len(self.sizes)} host(s) ({', '.join(shown)}{more})"
        )


# ------------------------------------------------------------------------------------------------------------- GPUs
def gpu_of(hosts: Hosts) -> int:
    """The number of this rank's GPU among those it sees. Raises the same `UserError` on every rank.

    It is the launcher's local rank, unless an earlier rank has that GPU. If each rank sees one GPU of its own, the
    number is 0 on every rank.
    """
    taken: dict[tuple[tuple[str, str, str], str], int] = {}
    chosen = 0
    for rank, info in enumerate(hosts.ranks):
        before = sum(other.place == info.place for other in hosts.ranks[:rank])
        wanted = before if info.local_rank is None else info.local_rank
        numbers = sorted(range(len(info.gpus)), key=lambda number: (number != wanted, number))
        free = [number for number in numbers if (info.place, info.gpus[number]) not in taken]
        if not free:
            count = sum(other.place == info.place for other in hosts.ranks)
            raise UserError(
                f"host {info.host} has {len(set(info.gpus))} usable GPU(s) for rank {rank}, but {count} "
                "ranks were started on it; start as many ranks as there are GPUs (`deepspeed --num_gpus`)"
            )
        taken[info.place, info.gpus[free[0]]] = rank
        if rank == hosts.rank:
            chosen = free[0]
    return chosen


# ----------------------------------------------------------------------------------------------------------- threads
class Threads(NamedTuple):
    """Threads per rank for work on the CPU: Adam and the average if they are offloaded."""

    number: int
    reason: str

    def describe(self) -> str:
        """A line for the log."""
        return f"{self.number} thread(s) per rank for work on the CPU: {self.reason}"


def threads_of(hosts: Hosts, environ: Mapping[str, str], launcher: Mapping[str, str] | None) -> Threads:
    """OMP_NUM_THREADS, unless torchrun has set it; else this rank's share of the cores that it may run on.

    `launcher` is the environment in which the launcher was started: torchrun sets OMP_NUM_THREADS to 1 if it is not
    set there.
    """
    given = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in environ
    if given.isdecimal() and int(given) and not (by_torchrun and launcher is not None and _is_open(launcher)):
        unsure = by_torchrun and launcher is None
        hint = "; it may be torchrun's default: pass another with `OMP_NUM_THREADS=8 torchrun ...`" if unsure else ""
        return Threads(int(given), f"OMP_NUM_THREADS is set{hint}")
    cores = hosts.ranks[hosts.rank].cores
    sharing = [rank for rank in hosts.here if set(hosts.ranks[rank].cores) & set(cores)]
    ranks = hosts.local_size if len(sharing) == len(hosts.here) else len(sharing)
    available = max(1, min(len(cores), core_limit()))
    count = max(1, available // ranks)
    instead = " (OMP_NUM_THREADS=1 is torchrun's own default)" if by_torchrun else ""
    return Threads(count, f"{available} core(s) for {ranks} rank(s){instead}; OMP_NUM_THREADS sets another number")


def core_limit() -> int:
    """A container's CPU limit in cores, rounded up; a number above any machine's if there is no limit."""
    for path in _QUOTAS:
        quota, _, period = _content(path).replace("\n", " ").partition(" ")
        period = period or _content(path.with_name("cpu.cfs_period_us"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            return -(-int(quota) // int(period))
    return 2**20


def _is_open(launcher: Mapping[str, str]) -> bool:
    return not launcher.get("OMP_NUM_THREADS")


# ---------------------------------------------------------------------------------------------------------- networks
def own_address(towards: str, port: int) -> str:
    """The address from which this host reaches `towards`; "" if unknown."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def network_interface(hosts: Hosts) -> str | None:
    """The name of the interface by which this host reaches the others; None if unknown.

    gloo would take the interface of the host's own name, which on many systems is the loopback interface.
    """
    own = hosts.ranks[hosts.rank].address
    if _is_loopback(own):  # rank 0's host reaches itself this way
        others = [info.address for rank, info in enumerate(hosts.ranks) if rank not in hosts.here]
        own = next((own_address(other, 9) for other in others if not _is_loopback(other)), "")
    if _is_loopback(own):
        return None
    import psutil  # type: ignore[import-untyped]  # DeepSpeed brings it

    interfaces = psutil.net_if_addrs().items()
    # With IPv6, psutil adds the name of the interface ("fe80::1%eth0").
    return next((name for name, held in interfaces if own in [each.address.split("%")[0] for each in held]), None)


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.") or address == "::1"


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
