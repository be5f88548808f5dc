"""One thread beside training.

Guarantees: jobs run in the order they were added, one at a time; what one raises is raised again by `wait`, once all
have ended; tensors on a GPU are read as they were when the thread was made, beside what the GPU goes on to compute.
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
    """The job was told to end early."""


class Background:
    """`device` is where the tensors lie that jobs read. End it by `wait` or `give_up`."""

    def __init__(self, device: torch.device):
        self.ended = time.monotonic()  # when the last job did
        self._device = device
        self._computed = _event_now(device)
        self._given_up = threading.Event()
        self._jobs: list[futures.Future[None]] = []
        # Not a daemon: one that is inside a torch call when the interpreter ends would abort the process.
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="bagel_ds-background")

    def add(self, job: Callable[[], None]) -> None:
        self._jobs.append(self._pool.submit(self._run, job))

    def wait(self) -> None:
        """Until all jobs have ended; raises what the first of those that failed raised."""
        futures.wait(self._jobs)
        self._pool.shutdown()
        for job in self._jobs:
            job.result()

    def give_up(self) -> None:
        """End as soon as `until_given_up` sees it, without the jobs that have not begun; what fails is not told."""
        self._given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def until_given_up(self, items: Iterable[Item]) -> Iterator[Item]:
        """For jobs that take long: `items`, but no more of them after `give_up`."""
        for item in items:
            if self._given_up.is_set():
                raise GivenUp
            yield item

    def _run(self, job: Callable[[], None]) -> None:
        try:
            with ExitStack() as stack:
                if self._computed is not None:
                    # Both are a thread's own. On the stream of training a copy would wait for the step under way.
                    stack.enter_context(torch.cuda.device(self._device))
                    stream = torch.cuda.Stream(self._device)
                    stream.wait_event(self._computed)
                    stack.enter_context(torch.cuda.stream(stream))
                job()
        finally:
            self.ended = time.monotonic()


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """What the GPU has reached when all is computed that was asked for until now; None without a GPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
