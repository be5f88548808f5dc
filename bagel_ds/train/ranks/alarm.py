"""A rank that fails notifies all other ranks, on all hosts, over the store through which the ranks met.

Guarantees: within seconds of `sound` on one rank, every other rank prints which one failed and ends with code 1. A
separate thread listens, so this works during a hanging collective call. The same happens if the store is gone, which
ends with rank 0 (under torchrun with the first host's agent), and, with `watch_hosts`, if a host sends nothing for two
minutes: one that loses power or its network closes no connection, and collective calls would wait for it. `close` it
before ranks end normally.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from bagel_ds.train.process.detach import end_at_once, process_state
from bagel_ds.train.ranks.hosts import Hosts

_KEY = "failed"
_POLL_SECONDS = 1.0
_SOUND_SECONDS = 5.0  # more than a live store needs
_HEARD_SECONDS = 1.5  # in which all ranks have polled
# The launcher ends all ranks once it sees that one has ended, and returns that rank's code. Waiting lets it be the code
# of the rank that failed, after its message is out.
GRACE_SECONDS = 3.0
_BEAT_SECONDS = 5.0  # between signs of life of a rank, if there are several hosts
_SILENT_SECONDS = 120.0  # after which a host is taken for dead: no call holds Python's lock that long
_GONE_SECONDS = 10.0  # for a rank that ends normally, as rank 0 has done, to close its alarm
_NAMED_SECONDS = 2.0  # in which a killed process, whose connections close first, is gone
# What gloo, NCCL and the store say if the process at the other end has ended.
_BROKEN = r"connection (was likely )?(closed|reset)|broken pipe|socket closed|remote process exited"

_current: _Alarm | None = None


def listen(store: dist.Store, hosts: Hosts, watch_hosts: bool = False) -> None:
    """Start listening; nothing else may use `store` from now on."""
    global _current
    if len(hosts.ranks) > 1:
        _current = _Alarm(store, hosts, watch_hosts)


def sound(why: str) -> None:
    """Notify the other ranks that this one ends; returns within seconds, whatever their state."""
    if _current is not None:
        _current.sound(why)


def is_listening() -> bool:
    """Whether there are other ranks that wait if this one ends."""
    return _current is not None and not _current.closed.is_set()


def own_rank() -> int:
    return 0 if _current is None else _current.rank


def heard() -> str | None:
    """Which rank failed before this one, and why; None if none did."""
    return None if _current is None else _current.heard()


def ended_neighbors(error: BaseException) -> str | None:
    """Which ranks of this host have ended, if `error` is a connection that broke; None if it isn't or none has."""
    return None if _current is None else _current.ended_neighbors(error)


def broken_connection(why: str) -> str | None:
    """Which host is at the other end of a connection whose failure `why` describes, as gloo does; None if unknown."""
    return None if _current is None else _current.broken_connection(why)


def close() -> None:
    """Stop listening: from now on any rank may end."""
    if _current is not None:
        _current.closed.set()


class _Alarm:
    def __init__(self, store: dist.Store, hosts: Hosts, watch_hosts: bool):
        self.rank, self._store, self._hosts = hosts.rank, store, hosts
        self._failed: str | None = None
        self._places = list(dict.fromkeys(info.place for info in hosts.ranks))
        self._watches = watch_hosts and len(self._places) > 1
        self._beaten = 0.0
        self._heard_of: dict[int, tuple[int, float]] = {}  # on rank 0, by host: its signs of life, seconds without one
        self._answers = 0  # of the store
        self.closed = threading.Event()
        threading.Thread(target=self._run, name="bagel_ds-alarm", daemon=True).start()
        if self._watches and self._own_place:
            threading.Thread(target=self._watch_store, name="bagel_ds-alarm-store", daemon=True).start()

    @property
    def _own_place(self) -> int:
        return self._places.index(self._hosts.ranks[self.rank].place)

    def ended_neighbors(self, error: BaseException) -> str | None:
        if not isinstance(error, RuntimeError) or re.search(_BROKEN, str(error), re.IGNORECASE) is None:
            return None
        neighbors, deadline = self._hosts.neighbors, time.monotonic() + _NAMED_SECONDS
        while not (gone := [rank for rank, pid in neighbors.items() if process_state(pid) is None]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        names = ", ".join(f"rank {rank} (process {neighbors[rank]})" for rank in gone)
        return f"{names} has ended" if len(gone) == 1 else f"{names} have ended"

    def broken_connection(self, why: str) -> str | None:
        if re.search(_BROKEN, why, re.IGNORECASE) is None:
            return None
        for number, place in enumerate(self._places):
            addresses = {info.address for info in self._hosts.ranks if info.place == place and info.address}
            if number != self._own_place and any(f"[{address}]" in why for address in addresses):
                return f"the connection to {self._describe(number)} is gone: that host or its processes have ended"
        return None

    def _describe(self, number: int) -> str:
        ranks = [str(rank) for rank, info in enumerate(self._hosts.ranks) if info.place == self._places[number]]
        return f"host {self._places[number][0]} (rank{'s' * (len(ranks) > 1)} {', '.join(ranks)})"

    def sound(self, why: str) -> None:
        own = json.dumps([self.rank, self._hosts.ranks[self.rank].host, why])
        # Only the first failure counts; the others follow from it.
        teller = threading.Thread(target=self._try, args=(lambda: self._store.compare_set(_KEY, "", own),), daemon=True)
        teller.start()
        teller.join(_SOUND_SECONDS)
        if self.rank == 0:
            time.sleep(_HEARD_SECONDS)  # the store may end with this process

    def heard(self) -> str | None:
        asker = threading.Thread(target=self._try, args=(self._look,), daemon=True)
        asker.start()
        asker.join(_SOUND_SECONDS)
        return self._failed

    def _look(self) -> None:
        if self._failed is None and self._store.check([_KEY]):
            rank, host, why = json.loads(self._store.get(_KEY))
            if rank != self.rank:
                elsewhere = f" on {host}" if host != self._hosts.ranks[self.rank].host else ""
                self._failed = f"rank {rank}{elsewhere} has ended ({why})"

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError:  # the store is gone, which the other ranks notice
            pass

    def _run(self) -> None:
        while not self.closed.wait(_POLL_SECONDS):
            try:
                self._look()
                if self._watches:
                    self._give_sign()
            except RuntimeError:
                where = self._hosts.ranks[0].host
                self._end(f"the process that connected the ranks has ended (rank 0's on {where}, or torchrun's)",
                          _GONE_SECONDS)  # fmt: skip
            self._answers += 1
            if self._failed is not None:
                self._end(self._failed, GRACE_SECONDS)
        if self._watches:
            self._try(lambda: self._store.add(f"left/{self._own_place}", 1))

    def _give_sign(self) -> None:
        """Show that this host lives. On rank 0, end the run if another has not for too long."""
        since = time.monotonic() - self._beaten
        if since < _BEAT_SECONDS:
            return
        self._beaten += since
        self._store.add(f"alive/{self._own_place}", 1)
        for number in range(1, len(self._places)) if self.rank == 0 else ():
            if self._store.add(f"left/{number}", 0):
                continue
            count, silent = self._heard_of.get(number, (-1, 0.0))
            found = self._store.add(f"alive/{number}", 0)
            # The time in which this rank was stopped, too, does not count.
            silent = 0.0 if found != count else silent + min(since, 2 * _BEAT_SECONDS)
            self._heard_of[number] = found, silent
            if silent > _SILENT_SECONDS:
                why = f"{self._describe(number)} has sent nothing for {silent:.0f} s: it has died or lost its network"
                self.sound(why)
                self._end(why, 0.0)

    def _watch_store(self) -> None:
        """End this rank if the host of rank 0 is silent: calls of its store would wait for it."""
        answers, silent, before = 0, 0.0, time.monotonic()
        while not self.closed.wait(_POLL_SECONDS):
            now = time.monotonic()
            silent = 0.0 if self._answers != answers else silent + min(now - before, 2 * _POLL_SECONDS)
            answers, before = self._answers, now
            if silent > _SILENT_SECONDS:
                who = self._describe(0)
                self._end(f"{who} has not answered for {silent:.0f} s: it has died or lost its network", 0.0)

    def _end(self, why: str, grace: float) -> None:
        if self.closed.wait(grace):
            return
        print(f"[rank {self.rank}] {why}; ending this rank, too", file=sys.stderr, flush=True)
        time.sleep(0.1)  # for the launcher's pipe
        end_at_once(1)
