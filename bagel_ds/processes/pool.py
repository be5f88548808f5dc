"""Many tasks on several processes, results in order; `bagel-ds index` and `check` share this pool.

Guarantees: each process has one task at a time, so the message about a lost process names its task. Closing the
iterator, or an exception in it, ends the processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from bagel_ds.processes.worker import Worker, answer_tasks, start_worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Any, Task], Result],
    shared: Any,
    tasks: Sequence[Task],
    processes: int,
    name: str,
    doing: Callable[[Task], str],
) -> Iterator[Result]:
    """`work(shared, task)` of each task, on at most `processes` processes, in the order of `tasks`.

    `name` and `doing` are for messages: "indexing process 3" ... "it read a.parquet". Raises as `Worker.receive` does.
    """
    left = deque(enumerate(tasks))
    busy: dict[Connection, tuple[Worker, int]] = {}
    done: dict[int, Result] = {}

    def give(worker: Worker) -> None:
        if left:
            number, task = left.popleft()
            busy[worker.connection] = worker, number
            worker.doing = partial(doing, task)
            worker.send(task)

    workers: list[Worker] = []
    try:
        for number in range(min(processes, len(tasks))):
            workers.append(start_worker(_answer, work, name=f"{name} {number}", shared=shared))
            give(workers[-1])
        for number in range(len(tasks)):
            while number not in done:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker, finished = busy.pop(connection)
                    done[finished] = worker.receive()
                    give(worker)
            yield done.pop(number)
    finally:
        for worker in workers:
            worker.end()


def _answer(connection: Connection, shared: Any, work: Callable[[Any, Any], Any]) -> None:
    answer_tasks(connection, partial(work, shared))
