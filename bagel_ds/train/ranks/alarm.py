"""A rank that fails notifies all other ranks, on all hosts, over the store through which the ranks met.

Guarantees: within seconds of `sound` on one rank, every other rank prints which one failed and ends with code 1. A
separate thread listens, so this works during a hanging collective call. The same happens if the store is gone, which
ends with rank 0 (under torchrun with the first host's agent). `close` it before ranks end normally.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from bagel_ds.train.process.detach import end_at_once
from bagel_ds.train.ranks.hosts import Hosts

_KEY = "failed"
_POLL_SECONDS = 1.0
_SOUND_SECONDS = 5.0  # more than a live store needs
_HEARD_SECONDS = 1.5  # in which all ranks have polled
# The launcher ends all ranks once it sees that one has ended, and returns that rank's code. Waiting lets it be the code
# of the rank that failed, after its message is out.
GRACE_SECONDS = 3.0
_GONE_SECONDS = 10.0  # for a rank that ends normally, as rank 0 has done, to close its alarm

_current: _Alarm | None = None


def listen(store: dist.Store, hosts: Hosts) -> None:
    """Start listening; nothing else may use `store` from now on."""
    global _current
    if len(hosts.ranks) > 1:
        _current = _Alarm(store, hosts)


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


def close() -> None:
    """Stop listening: from now on any rank may end."""
    if _current is not None:
        _current.closed.set()


class _Alarm:
    def __init__(self, store: dist.Store, hosts: Hosts):
        self.rank, self._store, self._hosts = hosts.rank, store, hosts
        self._failed: str | None = None
        self.closed = threading.Event()
        threading.Thread(target=self._run, name="bagel_ds-alarm", daemon=True).start()

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
            except RuntimeError:
                self._end("the process that connected the ranks has ended (rank 0's, or torchrun's)", _GONE_SECONDS)
            if self._failed is not None:
                self._end(self._failed, GRACE_SECONDS)

    def _end(self, why: str, grace: float) -> None:
        if self.closed.wait(grace):
            return
        print(f"[rank {self.rank}] {why}; ending this rank, too", file=sys.stderr, flush=True)
        time.sleep(0.1)  # for the launcher's pipe
        end_at_once(1)
