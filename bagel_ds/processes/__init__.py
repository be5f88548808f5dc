"""Processes that work beside this one: data workers, the pool that indexes and checks, the index made during training.

All of them are forked by one server process (`server.py`), which is a fresh interpreter without threads, so the calling
process may hold any: gloo, NCCL, OpenMP, CUDA. None outlives the process that started it. They need no file: nothing in
/dev/shm, no socket in TMPDIR, and the script of the caller is not imported again.
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
