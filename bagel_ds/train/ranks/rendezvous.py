"""How ranks meet: at MASTER_ADDR and MASTER_PORT, which the launcher sets.

Guarantees: a port that is taken, an address that can't be reached and ranks that don't come within ten minutes are one
`UserError` each. A rank that waits for others logs it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from bagel_ds.errors import UserError
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.train.ranks.launcher import Launch

_MEET_SECONDS = 600.0  # for all ranks to be started
_GRACE_SECONDS = 5.0  # for a first rank to report and the launcher to end the others


def check_meeting_point(launch: Launch) -> None:
    """Raise `UserError` if rank 0 can't listen. Call it before ranks meet."""
    if launch.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens itself
        return
    error = _listen_error(launch.port)
    if error is not None:
        raise UserError(_port_fault(launch.port, error))


def meet(launch: Launch, own: str) -> tuple[dist.Store, list[bytes]]:
    """Wait for all ranks; the store through which they met, and each rank's message, of which this rank's is `own`.

    On rank 0 the store lives in this process, and torch goes on using it. Raises `UserError` if the network fails.
    """
    place = f"{launch.address}:{launch.port}"
    patience = timedelta(seconds=_MEET_SECONDS / (1 if launch.rank == 0 else 2))  # torch tries twice to connect
    # torchrun's store may outlive its ranks, which it restarts with --max_restarts.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        with waiting_for(f"all {launch.world_size} ranks to join at {place}", "every host must have been started"):
            store = dist.PrefixStore(f"bagel_ds/{attempt}", next(dist.rendezvous("env://", timeout=patience))[0])
            store.set(f"rank/{launch.rank}", own)
            return store, store.multi_get([f"rank/{rank}" for rank in range(launch.world_size)])
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        let_first_rank_report(not launch.local_rank)
        host = socket.gethostname()
        raise UserError(
            f"rank {launch.rank} on {host} can't meet the others at {place} (--master_addr, --master_port): "
            f"{str(error).splitlines()[0]} Check that all {launch.world_size} ranks ({launch.launcher}) are started, "
            "that rank 0 runs on that host, that no firewall is in between and that the port is free"
        ) from None


def let_first_rank_report(is_first: bool) -> None:
    """Call before raising what the first rank of the host most likely also raises: one message is enough."""
    if not is_first:
        time.sleep(_GRACE_SECONDS)


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
