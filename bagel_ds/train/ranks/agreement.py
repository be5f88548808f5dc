"""Checks that all ranks make together, so that they go on or stop together.

Guarantees: a fault on one rank reaches all ranks before any of them waits in a collective call of the engine, with the
host's name. Ranks that would train different runs (other data, packages or folders) never start. These exchanges use a
separate gloo group: it needs no GPU and does not wait for one, and NCCL's watchdog can't end it.
"""

from __future__ import annotations

import errno
import socket
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Sequence, TypeVar

import torch
import torch.distributed as dist

from bagel_ds.errors import UserError, disk_fault
from bagel_ds.machine.liveness import going_on
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.train.ranks.hosts import Hosts

Result = TypeVar("Result")

_hosts: Hosts | None = None
_control: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # torch's group of all ranks, and ours


class SharedFault(UserError):
    """A `UserError` that every rank raises with the same message, so that rank 0 reports it."""


def is_main() -> bool:
    return dist.get_rank() == 0


def enter(found: Hosts) -> None:
    """Set what `hosts` returns, once the ranks have met."""
    global _hosts
    _hosts = found


def hosts() -> Hosts:
    """Where the ranks are."""
    assert _hosts is not None, "the ranks have not met (process_group.join_ranks)"
    return _hosts


def on_one_host() -> bool:
    """Whether all ranks run under one kernel, so that they see each other's writes at once."""
    return hosts().on_one_machine


def local_rank() -> int:
    """This rank's index among the ranks of its host."""
    return hosts().local_rank


def control_group() -> dist.ProcessGroup:
    """The gloo group for objects and barriers. The first call makes it, so make that call on all ranks."""
    global _control
    world = dist.group.WORLD
    assert world is not None
    if _control is None or _control[0] is not world:
        made = dist.new_group(backend="gloo")
        assert made is not None
        _control = (world, made)
    return _control[1]


def barrier() -> None:
    """Return once every rank has called it."""
    dist.barrier(group=control_group())


def together(function: Callable[[], Result]) -> Result:
    """`function()` on every rank. If any raises `UserError`, every rank raises the first of them as `SharedFault`."""
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


def write_together(write: Callable[[], Result]) -> Result:
    """`together` for work on files: an error of the disk becomes a `UserError` with the remedy."""

    def action() -> Result:
        try:
            return write()
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise  # memory, not the disk
            raise UserError(disk_fault(error, "save elsewhere")) from None

    return together(action)


def one_per_host_first(function: Callable[[], Result], what: str = "it is busy") -> Result:
    """`function()` on one rank of each host first, then on the others, which find its caches filled.

    `function` must not communicate between ranks. It runs in a thread while the ranks keep exchanging that they are
    alive, so that hours of indexing don't run into a collective call's timeout. The log says `what` other hosts are
    doing; on rank 0's host `function` itself should log what takes long.
    """
    if local_rank() != 0:
        _wait_for(None, what)
        together(lambda: None)  # a fault of a first rank also stops this one
        return together(function)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(function)
        _wait_for(work, what)
        result = together(work.result)
    together(lambda: None)
    return result


def _wait_for(work: Future[Any] | None, what: str) -> None:
    """Return when `work` is done on every rank that has some."""
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
                going_on()  # a stalled host is ended by its own watch
            time.sleep(min(0.05 + (time.monotonic() - began) / 10, 1.0))


def from_every_host(lines: list[str]) -> list[str]:
    """Lines of the first rank of each host, with the host's name unless it is rank 0's."""
    found = everyone((socket.gethostname(), lines if local_rank() == 0 else []))
    here = found[0][0]
    return [line if host == here else f"host {host}: {line}" for host, said in found for line in said]


def everyone(value: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=control_group())
    return gathered


def on_any_rank(value: bool) -> bool:
    """Whether `value` is true on any rank."""
    found = torch.tensor(int(value))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=control_group())
    return bool(found)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Each of `values`, added up over all ranks in fp64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=control_group())
    return total.tolist()  # type: ignore[no-any-return]


def to_main(value: Any) -> list[Any] | None:
    """`value` of every rank on rank 0, None on the others."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, gathered, group=control_group())
    return gathered


def check_equal(what: dict[str, Any]) -> None:
    """Raise `SharedFault` for the first entry in which a rank differs from rank 0, with both values and hosts."""
    found = everyone((what, socket.gethostname()))
    for rank, (theirs, host) in enumerate(found):
        for name, value in found[0][0].items():
            if theirs.get(name) != value:
                raise SharedFault(
                    f"{name} differs between ranks: rank 0 on {found[0][1]} has {value}, rank {rank} on {host} has "
                    f"{theirs.get(name)}. Every host needs the same files, packages and arguments."
                )


def check_shared_folder(folder: Path, argument: str) -> None:
    """Raise `SharedFault` unless every rank sees the file that rank 0 writes into `folder`."""
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
