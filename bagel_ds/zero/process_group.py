"""The process group of all ranks as DeepSpeed starts and ends it."""

from __future__ import annotations

from datetime import timedelta

import deepspeed


def start_process_group(timeout: timedelta) -> None:
    """Start it from the launcher's variables; `timeout` is that of its collective calls."""
    deepspeed.init_distributed(verbose=False, timeout=timeout)


def end_process_group() -> None:
    """End it. Under NCCL this waits for all ranks."""
    deepspeed.comm.destroy_process_group()


def ask_mpi(port: int) -> None:
    """Set RANK, MASTER_ADDR and the other variables as MPI knows them."""
    deepspeed.comm.comm.mpi_discovery(distributed_port=port, verbose=False)
