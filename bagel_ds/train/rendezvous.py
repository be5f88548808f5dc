"""Where ranks meet: MASTER_ADDR and MASTER_PORT, which the launcher sets.

Guarantees: a port that can't be listened on, an address that can't be reached and a port that is none are one
`UserError` each; who waits for ranks that have not come yet says so.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import contextmanager
from typing import Iterator

import torch.distributed as dist

from bagel_ds.errors import UserError
from bagel_ds.train.agreement import SharedFault, local_rank
from bagel_ds.waiting import waiting_for

_GRACE_SECONDS = 5.0  # in which a first rank has spoken and the launcher has ended the others


def check_meeting_point() -> None:
    """Raise `UserError` where rank 0 can't listen. Call before the process group is initialised."""
    named = os.environ.get("MASTER_PORT")
    if named is None or dist.is_initialized():  # mpirun tells ranks otherwise
        return
    is_first = os.environ.get("RANK", "0") == "0"
    if not (named.isdecimal() and 0 < int(named) < 2**16):
        fault = f"MASTER_PORT (--master_port) {named}: expected a whole number from 1 to 65535, such as 29500"
        raise UserError(fault) if is_first else SharedFault(fault)
    if not is_first or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens itself
        return
    error = _listen_error(int(named))
    if error is not None:
        raise UserError(_port_fault(int(named), error))


@contextmanager
def meeting() -> Iterator[None]:
    """Around the call that brings ranks together. What the network refuses is a `UserError`."""
    if dist.is_initialized():
        yield
        return
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        with waiting_for(f"all {size} ranks to join at {place}", "every host must have been started"):
            yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        let_first_rank_speak()
        raise UserError(
            f"rank {rank} on {socket.gethostname()} can't meet the others at {place} (--master_addr, --master_port): "
            f"{str(error).splitlines()[0]} See that rank 0 runs on that host, that no firewall is in between and that "
            "the port is free"
        ) from None


def let_first_rank_speak() -> None:
    """Before a rank raises what the first rank of its host most likely meets, too: one message is enough."""
    if local_rank() != 0:
        time.sleep(_GRACE_SECONDS)


def _listen_error(port: int) -> OSError | None:
    """Why nothing can listen on a port of this host, tried as torch does; None where it can."""
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
