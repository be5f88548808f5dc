"""Processes beside this one: data workers, the pool that indexes and checks, and indexing during training.

One server process (`server.py`) forks all of them. It is a fresh interpreter without threads, so the calling process
may have any: gloo, NCCL, OpenMP, CUDA. No process outlives the one that started it. None needs a file: nothing lies in
/dev/shm or TMPDIR, and the caller's script is not imported again. This package knows nothing of data except the names
of the modules that the server preloads; it imports `errors` only. Begin with `worker.py`, `start_worker`.
"""

from bagel_ds.processes.pool import in_order
from bagel_ds.processes.worker import (
    Worker,
    WorkerFailed,
    WorkerLost,
    answer_tasks,
    show_stacks,
    start_server,
    start_worker,
)

__all__ = [
    "Worker",
    "WorkerFailed",
    "WorkerLost",
    "answer_tasks",
    "in_order",
    "show_stacks",
    "start_server",
    "start_worker",
]
