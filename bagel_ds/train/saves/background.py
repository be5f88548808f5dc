"""One thread that works while training goes on.

Guarantees: jobs run one at a time, in the order they were added. `wait` returns once all have ended and raises what the
first failed job raised. Jobs read tensors on a GPU as they were when the thread was made, while the GPU computes on.
`give_up` needs no other rank, also if the running job waits for one.
"""

from __future__ import annotations

import threading
import time
from concurrent import futures
from contextlib import ExitStack
from typing import Callable, Iterable, Iterator, TypeVar

import torch

from bagel_ds.errors import UserError

Item = TypeVar("Item")


class GivenUp(Exception):
    """`Background.give_up` ended the job early."""


class Background:
    """`device` holds the tensors that jobs read. End it with `wait` or `give_up`.

    `interrupt` ends what a job waits for; `give_up` calls it.
    """

    def __init__(self, device: torch.device, interrupt: Callable[[], None] | None = None):
        self.ended = time.monotonic()  # of the last job
        self._device, self._interrupt = device, interrupt
        self._computed = _event_now(device)
        self._given_up = threading.Event()
        self._jobs: list[futures.Future[None]] = []
        # Not a daemon: one that is inside a torch call when the interpreter ends would abort the process.
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="bagel_ds-background")

    def add(self, job: Callable[[], None]) -> None:
        self._jobs.append(self._pool.submit(self._run, job))

    def ended_within(self, seconds: float) -> bool:
        """Wait at most so long; whether all jobs have ended. Raises what is neither a `UserError` nor of the disk."""
        ended, running = futures.wait(self._jobs, seconds)
        for job in ended:
            error = job.exception()
            if error is not None and not isinstance(error, (UserError, OSError)):
                raise error
        return not running

    def wait(self) -> None:
        """Return once all jobs have ended; raises what the first failed one raised."""
        futures.wait(self._jobs)
        self._pool.shutdown()
        for job in self._jobs:
            job.result()

    def give_up(self) -> None:
        """End as soon as the running job reaches `until_given_up`; start no further job and drop all failures."""
        self._given_up.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._interrupt is not None and not all(job.done() for job in self._jobs):
            self._interrupt()
        self._pool.shutdown()

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
