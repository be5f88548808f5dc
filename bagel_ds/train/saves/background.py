"""One thread that works while training goes on.

Guarantees: jobs run one at a time, in the order they were added. `wait` returns once all have ended and raises what the
first failed job raised. Jobs read tensors on a GPU as they were when the thread was made, while the GPU computes on.
"""

from __future__ import annotations

import threading
import time
from concurrent import futures
from contextlib import ExitStack
from typing import Callable, Iterable, Iterator, TypeVar

import torch

Item = TypeVar("Item")


class GivenUp(Exception):
    """`Background.give_up` ended the job early."""


class Background:
    """`device` holds the tensors that jobs read. End it with `wait` or `give_up`."""

    def __init__(self, device: torch.device):
        self.ended = time.monotonic()  # of the last job
        self._device = device
        self._computed = _event_now(device)
        self._given_up = threading.Event()
        self._jobs: list[futures.Future[None]] = []
        # Not a daemon: one that is inside a torch call when the interpreter ends would abort the process.
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="bagel_ds-background")

    def add(self, job: Callable[[], None]) -> None:
        self._jobs.append(self._pool.submit(self._run, job))

    def wait(self) -> None:
        """Return once all jobs have ended; raises what the first failed one raised."""
        futures.wait(self._jobs)
        self._pool.shutdown()
        for job in self._jobs:
            job.result()

    def give_up(self) -> None:
        """End as soon as the running job reaches `until_given_up`; start no further job and drop all failures."""
        self._given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def until_given_up(self, items: Iterable[Item]) -> Iterator[Item]:
        """For long jobs: yield `items`, but none after `give_up`."""
        for item in items:
            if self._given_up.is_set():
                raise GivenUp
            yield item

    def _run(self, job: Callable[[], None]) -> None:
        try:
            with ExitStack() as stack:
                if self._computed is not None:
                    # Both are per thread. On the stream of training a copy would wait for the running step.
                    stack.enter_context(torch.cuda.device(self._device))
                    stream = torch.cuda.Stream(self._device)
                    stream.wait_event(self._computed)
                    stack.enter_context(torch.cuda.stream(stream))
                job()
        finally:
            self.ended = time.monotonic()


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """Marks the work queued on the GPU so far; None without a GPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
