"""Batches made by worker processes that take turns, a few ahead of their use.

Guarantees: batch n is made by worker n modulo their number, so the order never depends on their speed. A worker that
dies, fails or can't send its batch raises an error here when that batch is due. A worker that hangs is left to the
caller's stall watch. Closing the generator leaves no process and no thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from itertools import cycle
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Callable

import torch

from bagel_ds.data.batches.materialize import PackTask
from bagel_ds.data.batches.shared_batch import ReceivedBatch, receive_batch, send_batch
from bagel_ds.data.samples import resize
from bagel_ds.model.batch import PackedBatch
from bagel_ds.processes import answer_tasks, start_worker

_NAMED_SAMPLES = 3  # of a pack that could not be made
_JOIN_SECONDS = 5.0


def worker_batches(
    maker: Callable[[PackTask], PackedBatch], tasks: Iterator[PackTask], workers: int, prefetch: int, pin_memory: bool
) -> Generator[PackedBatch, None, None]:
    """`maker(task)` of each task; every worker has `prefetch` tasks ahead. Raises as `Worker.receive` does."""
    device = torch.cuda.current_device() if pin_memory else None
    fault = resize.prepare()
    started: list[_BatchWorker] = []
    try:
        for number in range(workers):
            started.append(_BatchWorker(number, maker, device, fault))
        for _ in range(prefetch):
            for worker in started:
                worker.give(next(tasks))
        for worker in cycle(started):
            batch = worker.take()
            worker.give(next(tasks))
            yield batch
    finally:
        for worker in started:
            worker.end()


class _BatchWorker:
    """One process, and a thread that receives from it, so that neither waits for the other to read.

    With a `device` the thread puts batches into page-locked memory, for that GPU.
    """

    def __init__(
        self, number: int, maker: Callable[[PackTask], PackedBatch], device: int | None, resize_fault: str
    ) -> None:
        self._given: deque[PackTask] = deque()
        self._worker = start_worker(_make_batches, resize_fault, shared=maker, name=f"data worker {number}")
        self._worker.doing = self._doing
        self._made: SimpleQueue[PackedBatch | BaseException] = SimpleQueue()
        self._device = device
        self._thread = threading.Thread(target=self._receive, name=self._worker.name, daemon=True)
        self._thread.start()

    def give(self, task: PackTask) -> None:
        self._given.append(task)
        self._worker.send(task)

    def take(self) -> PackedBatch:
        """Wait for the batch of the oldest task that was given and not taken yet."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def end(self) -> None:
        self._worker.ended()
        self._thread.join(_JOIN_SECONDS)
        self._worker.end()
        while not self._made.empty():  # an error's traceback refers to this object: a cycle that would keep batches
            self._made.get()

    def _receive(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            while True:
                received = self._worker.receive(receive_batch)
                assert isinstance(received, ReceivedBatch)
                batch = received.batch()
                self._given.popleft()
                self._made.put(batch if self._device is None else batch.pin_memory())
        except BaseException as error:  # also where `end` ended the worker; then no one takes the error
            self._made.put(error)

    def _doing(self) -> str:
        given = list(self._given)  # the main thread adds to them
        if not given:
            return "it had nothing to do"
        places = [str(address.place) for address in given[0].addresses]
        rest = f" and {len(places) - _NAMED_SAMPLES} more" if len(places) > _NAMED_SAMPLES else ""
        return f"it made a pack of {'; '.join(places[:_NAMED_SAMPLES])}{rest}"


def _make_batches(connection: Connection, maker: Callable[[PackTask], PackedBatch], resize_fault: str) -> None:
    torch.set_num_threads(1)
    resize.began(resize_fault)
    answer_tasks(connection, maker, send_batch)
