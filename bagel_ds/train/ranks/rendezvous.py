"""How ranks meet: at MASTER_ADDR and MASTER_PORT, which the launcher sets.

Guarantees: a port that is taken, an address that can't be reached and ranks that don't come within ten minutes are one
`UserError` each. While ranks wait, the log says every half minute which have come and which are missing, with their
hosts if the launcher names them.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from bagel_ds.errors import UserError
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.train.ranks.launcher import Launch

_MEET_SECONDS = 600.0  # for all ranks to be started
_LOOK_SECONDS = 5.0  # between looks at which ranks have come
_NAMED_HOSTS = 16  # in a message
_DOCTOR = "`bagel-ds doctor --hostfile FILE` finds a host that can't be reached"
_GRACE_SECONDS = 5.0  # for a first rank to report and the launcher to end the others


def check_meeting_point(launch: Launch) -> None:
    """Raise `UserError` if rank 0 can't listen. Call it before ranks meet."""
    if launch.rank != 0 or _torchrun_serves():
        return
    error = _listen_error(launch.port)
    if error is not None:
        raise UserError(_port_fault(launch.port, error))


def meet(launch: Launch, own: str, planned: Sequence[str] = ()) -> tuple[dist.Store, list[bytes]]:
    """Wait for all ranks; the store through which they met, and each rank's message, of which this rank's is `own`.

    On rank 0 the store lives in this process, and torch goes on using it. `planned` names each rank's host, if known.
    Raises `UserError` if ranks don't come or the network fails.
    """
    place, host, deadline = f"{launch.address}:{launch.port}", socket.gethostname(), time.monotonic() + _MEET_SECONDS
    arrivals = _Arrivals(launch, planned)
    # Rank 0 reports who is missing; until a host has reached it, its first rank does.
    level = logging.INFO if launch.rank == 0 else logging.WARNING
    try:
        with waiting_for(arrivals.awaited, f"every host must have been started; {_DOCTOR}", level):
            store = _store(launch)
            store.set(f"host/{launch.rank}", host)
            store.set(f"rank/{launch.rank}", own)
            if arrivals.all_within(deadline, store):
                return store, store.multi_get([f"rank/{rank}" for rank in range(launch.world_size)])
            why = f"after {_MEET_SECONDS:.0f} s {arrivals.described()}."
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        known = f" {arrivals.described()}." if arrivals.missing else ""
        why = f"{str(error).splitlines()[0]}{known}"
    let_first_rank_report(not launch.local_rank)
    raise UserError(
        f"rank {launch.rank} on {host} can't meet the others at {place} (--master_addr, --master_port): {why} Check "
        f"that all {launch.world_size} ranks ({launch.launcher}) are started, that rank 0 runs on that host, that no "
        f"firewall is in between and that the port is free; {_DOCTOR}"
    )


def _store(launch: Launch) -> dist.Store:
    """The store of all ranks, which rank 0 or torchrun's agent serves. Doesn't wait for other ranks but the server."""
    by_torchrun = _torchrun_serves()
    store = dist.TCPStore(
        str(launch.address),
        launch.port,
        is_master=launch.rank == 0 and not by_torchrun,
        timeout=timedelta(seconds=_MEET_SECONDS / 2),  # torch tries twice to connect
        wait_for_workers=False,
        multi_tenant=not by_torchrun,
    )
    # torchrun's store may outlive its ranks, which it restarts with --max_restarts.
    return dist.PrefixStore(f"bagel_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


class _Arrivals:
    """Which ranks have come, for messages."""

    def __init__(self, launch: Launch, planned: Sequence[str]):
        self._launch = launch
        self._planned = planned if len(planned) == launch.world_size else ()
        self._hosts: dict[int, str] = {}  # of the ranks that have come
        self.missing: list[int] = []  # when last looked

    def all_within(self, deadline: float, store: dist.Store) -> bool:
        """Wait until all ranks have come, or the deadline; whether they have.

        It asks again and again, because torch prints two warnings when the wait of a store ends without success.
        """
        keys, looked, pause = [f"rank/{rank}" for rank in range(self._launch.world_size)], -_LOOK_SECONDS, 0.02
        while not store.check(keys):
            now = time.monotonic()
            if now - looked >= _LOOK_SECONDS or now > deadline:
                self._look(store)
                looked = now
            if now > deadline:
                return not self.missing
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
        return True

    def _look(self, store: dist.Store) -> None:
        hosts, ranks = dict(self._hosts), range(self._launch.world_size)
        for rank in ranks:
            if rank not in hosts and store.check([f"rank/{rank}"]):
                hosts[rank] = store.get(f"host/{rank}").decode()
        # Replaced as a whole, because another thread reads it for the log.
        self._hosts, self.missing = hosts, [rank for rank in ranks if rank not in hosts]

    def awaited(self) -> str:
        """For `waiting_for`: the ranks that are missing, or "" if another rank says so."""
        launch, place = self._launch, f"{self._launch.address}:{self._launch.port}"
        if launch.rank == 0:
            return f"{self._absent()} to join at {place}; {self._present()} here" if self.missing else ""
        if self._hosts or launch.local_rank:
            return ""
        return f"rank 0 to answer at {place}; this is rank {launch.rank} on {socket.gethostname()}"

    def described(self) -> str:
        return f"{self._absent()} missing, {self._present()} here"

    def _absent(self) -> str:
        return _by_host([(rank, self._planned[rank] if self._planned else "") for rank in self.missing])

    def _present(self) -> str:
        return _by_host(sorted(self._hosts.items()))


def _by_host(ranks: Sequence[tuple[int, str]]) -> str:
    """Such as "ranks 0 to 7 (node1), 8 to 15 (node2)"."""
    spans: list[tuple[int, int, str]] = []
    for rank, host in ranks:
        if spans and spans[-1][1:] == (rank - 1, host):
            spans[-1] = (spans[-1][0], rank, host)
        else:
            spans.append((rank, rank, host))
    told = [
        (str(low) if low == high else f"{low} to {high}") + (f" ({host})" if host else "")
        for low, high, host in spans[:_NAMED_HOSTS]
    ]
    more = ", ..." if len(spans) > _NAMED_HOSTS else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(told)}{more}"


def let_first_rank_report(is_first: bool) -> None:
    """Call before raising what the first rank of the host most likely also raises: one message is enough."""
    if not is_first:
        time.sleep(_GRACE_SECONDS)


def _torchrun_serves() -> bool:
    """Whether the store is torchrun's own."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen_error(port: int) -> OSError | None:
    """Why no process can listen on a port of this host, tried as torch does; None if one can."""
    found = None
    for family, every_address in ((socket.AF_INET6, "::"), (socket.AF_INET, "")):
        try:
            with socket.socket(family) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((every_address, port))
                server.listen(1)
                return None
        except OSError as error:
            found = error
    return found


def _port_fault(port: int, error: OSError) -> str:
    free = next((other for other in range(max(port, 1023) + 1, 2**16) if _listen_error(other) is None), 0)
    taken = (
        "it is in use on this host, most often by another run" if error.errno == errno.EADDRINUSE else error.strerror
    )
    return (
        f"rank 0 can't listen on port {port} ({taken}). Give the launcher another one, as in `deepspeed --master_port "
        f"{free} ...` (MASTER_PORT), or end what uses it (`ss -ltnp` shows it)"
    )
