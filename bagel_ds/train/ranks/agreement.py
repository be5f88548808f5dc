"""Ranks that check the same things and stop together.

Guarantees: a fault that one rank meets reaches all of them before any waits in a collective call of the engine; ranks
that would train different runs (other data, other packages, other folders) never start; the host is named. What they
tell one another goes over a gloo group of its own: it needs no GPU, waits for none, and no watchdog of NCCL ends it.
"""

from __future__ import annotations

import socket
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, TypeVar

import torch.distributed as dist

from bagel_ds.errors import UserError
from bagel_ds.machine.liveness import going_on
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.train.ranks.hosts import Hosts

Result = TypeVar("Result")

_hosts: Hosts | None = None
_control: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # all ranks' groups: torch's, and ours beside it


class SharedFault(UserError):
    """A `UserError` that every rank has raised with the same message: one of them is enough to tell it."""


def is_main() -> bool:
    return dist.get_rank() == 0


def enter(found: Hosts) -> None:
    """Note where the ranks are, once they have met."""
    global _hosts
    _hosts = found


def hosts() -> Hosts:
    """Where the ranks are."""
    assert _hosts is not None, "the ranks have not met (process_group.join_ranks)"
    return _hosts


def on_one_host() -> bool:
    """Whether all ranks run under one kernel, and so see one another's writes at once."""
    return hosts().on_one_machine


def local_rank() -> int:
    """This rank's place among those of its host."""
    return hosts().local_rank


def control_group() -> dist.ProcessGroup:
    """The gloo group for objects and barriers, made at the first call: like every call here, one of all ranks."""
    global _control
    world = dist.group.WORLD
    assert world is not None
    if _control is None or _control[0] is not world:
        made = dist.new_group(backend="gloo")
        assert made is not None
        _control = (world, made)
    return _control[1]


def barrier() -> None:
    """Return once every rank has come here."""
    dist.barrier(group=control_group())


def together(function: Callable[[], Result]) -> Result:
    """`function()` on every rank; if it raises `UserError` on any, every rank raises `SharedFault` with the first's."""
    fault, result = None, None
    try:
        result = function()
    except UserError as error:
        fault = str(error)
    faults = everyone([fault, socket.gethostname()])
    for found, host in faults:
        if found is not None:
            elsewhere = f"on host {host}: " if host != faults[0][1] else ""
            raise SharedFault(elsewhere + found)
    return result  # type: ignore[return-value]


def one_per_host_first(function: Callable[[], Result], what: str = "it is busy") -> Result:
    """`function()` on one rank of each host, then on the others, which find its caches filled.

    `function` must not exchange anything between ranks: it runs in a thread, while all ranks tell each other that they
    are alive, so that hours of indexing meet no timeout of a collective call. `what` other hosts do is said in the log;
    what takes long on rank 0's own host should say so itself.
    """
    if local_rank() != 0:
        _wait_for(None, what)
        together(lambda: None)  # a fault of a first rank stops this one, too
        return together(function)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(function)
        _wait_for(work, what)
        result = together(work.result)
    together(lambda: None)
    return result


def _wait_for(work: Future[Any] | None, what: str) -> None:
    """Until `work` is done on every rank that has some."""
    began, busy = time.monotonic(), ["all ranks"]

    def others() -> str:
        return f"{', '.join(busy)}: {what}" if busy != [socket.gethostname()] else ""

    with waiting_for(others):
        while True:
            states = everyone((work is not None and not work.done(), socket.gethostname()))
            busy = sorted({host for is_busy, host in states if is_busy})
            if not busy:
                return
            if work is None or work.done():
                going_on()  # a host that doesn't is ended by its own watch
            time.sleep(min(0.05 + (time.monotonic() - began) / 10, 1.0))


def from_every_host(lines: list[str]) -> list[str]:
    """The lines of each host's first rank, those of other hosts than rank 0's with its name."""
    found = everyone((socket.gethostname(), lines if local_rank() == 0 else []))
    here = found[0][0]
    return [line if host == here else f"host {host}: {line}" for host, said in found for line in said]


def everyone(value: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=control_group())
    return gathered


def check_equal(what: dict[str, Any]) -> None:
    """Raise `SharedFault` naming the first entry in which a rank differs from rank 0, and the rank's host."""
    found = everyone((what, socket.gethostname()))
    for rank, (theirs, host) in enumerate(found):
        for name, value in found[0][0].items():
            if theirs.get(name) != value:
                raise SharedFault(
                    f"{name} differs between ranks: rank 0 on {found[0][1]} has {value}, rank {rank} on {host} has "
                    f"{theirs.get(name)}. Every host needs the same files, packages and arguments."
                )


def check_shared_folder(folder: Path, argument: str) -> None:
    """Raise `SharedFault` unless every rank sees in `folder` what rank 0 just wrote there."""
    name = everyone(f".shared-{uuid.uuid4().hex}")[0]

    def write() -> None:
        if is_main():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            except OSError as error:
                raise UserError(
                    f"--{argument} {folder} can't be written: {error.strerror}. Pass a folder you may write."
                ) from None

    def look() -> None:
        if not (folder / name).exists():
            raise UserError(
                f"--{argument} {folder} is not the folder that rank 0 writes to: it must be on a file system that all "
                "hosts share, under the same path."
            )

    together(write)
    try:
        together(look)
    finally:
        if is_main():
            (folder / name).unlink(missing_ok=True)
