"""What the launcher starts on every rank: parse, check, train, and end with an exit code.

Guarantees: a user's mistake is one message and exit code 2; anything else keeps its traceback. Rank 0 reports faults
common to all ranks, the first rank of a host reports that host's (packages, driver), and a rank that fails by itself
reports its own fault and exits immediately (failure.py).
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import sys
import threading
import time
from contextlib import closing
from typing import Sequence

from bagel_ds.arguments.run_config import RunConfig, parse_arguments, wandb_wanted
from bagel_ds.doctor.environment import machine_findings, refuse_faults
from bagel_ds.errors import UserError
from bagel_ds.machine.device import choose_kernels, uses_cuda
from bagel_ds.machine.output import outlive_the_reader
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.processes import start_server
from bagel_ds.train.process.detach import end_at_once, run_detached
from bagel_ds.train.process.quiet import quiet_warnings
from bagel_ds.train.ranks.launcher import Launch, LauncherProcess, Started, check_address, started

logger = logging.getLogger("bagel_ds")

# The launcher ends all ranks once it sees that one has ended; it looks every second. Silent ranks wait so that the
# reporter's message gets out.
_GRACE_SECONDS = 3.0
_CLOSING_SECONDS = 60.0  # for ranks to leave the process group


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say, in a new session; returns the exit code."""
    outlive_the_reader()
    by, arguments = started(), read_arguments(argv)
    code = run_detached(lambda: run_rank(arguments, by), by.reports)
    if code and isinstance(arguments, RunConfig):
        from bagel_ds.zero.swap_folders import sweep_folders

        sweep_folders(arguments.training.nvme_path)  # also the files of ranks that were killed
    return code


def read_arguments(argv: Sequence[str] | None = None) -> RunConfig | UserError:
    """The command line, or the fault for the rank to report."""
    try:
        return parse_arguments(list(sys.argv[1:] if argv is None else argv))
    except UserError as fault:
        return fault


def run_rank(arguments: RunConfig | UserError, by: Started) -> int:
    """Train as the arguments say, in this process; returns the exit code."""
    launch, fault, launcher = by
    rank = 0 if launch is None else launch.rank
    try:
        if isinstance(arguments, UserError):
            raise arguments
        if launch is None:
            assert fault is not None
            raise fault
        check_address(launch)
    except UserError as fault:
        return _report(fault, rank == 0)
    try:
        notes = refuse_faults(machine_findings(launch.local_size or 1))
    except UserError as fault:
        return _report(fault, not launch.local_rank, f"host {socket.gethostname()}: " if rank else "")
    return _train(arguments, launch, launcher, notes)


def _train(config: RunConfig, launch: Launch, launcher: LauncherProcess | None, notes: list[str]) -> int:
    """`notes` are log lines about this host."""
    if config.data.num_workers:
        start_server()  # it imports torch while this process does
    # Imported here because torch and DeepSpeed take seconds, and the checks above must work without them.
    from bagel_ds.train.metrics.console import setup_logging

    setup_logging(None, launch.rank)
    with waiting_for("torch and DeepSpeed to be imported", "minutes from a slow network disk, the first time"):
        from bagel_ds.train.process.allocators import exact_pinned_memory, expandable_segments, return_freed_memory
        from bagel_ds.train.process.out_of_memory import memory_fault
        from bagel_ds.train.process.stall import start_watch
        from bagel_ds.train.ranks import alarm
        from bagel_ds.train.ranks.agreement import SharedFault, from_every_host, together
        from bagel_ds.train.ranks.failure import ending_alone
        from bagel_ds.train.ranks.process_group import join_ranks
        from bagel_ds.train.trainer import Trainer
        from bagel_ds.zero.swap_folders import leave_folders

    quiet_warnings()
    return_freed_memory()
    choose_kernels(config.training.precision)
    if uses_cuda():
        exact_pinned_memory()
        expandable_segments()

    def explain(error: BaseException) -> UserError | None:
        return memory_fault(error, config.data.max_num_tokens)

    try:
        with ending_alone(explain):
            joined = join_ranks(launch, config.training.stall_timeout, launcher)
            # Watch this rank until it has ended.
            with closing(start_watch(config)) as watch, ending_alone(explain):
                together(lambda: setup_logging(config.training.results_dir, launch.rank))
                _log(joined.warnings, joined.notes, launch.rank)
                together(lambda: check_wandb_of(config, launch.rank))
                lines = (*config.notes, *from_every_host(notes + joined.of_host))
                Trainer(dataclasses.replace(config, notes=lines), watch).run()
    except UserError as fault:
        alarm.close()
        code = _report(fault, launch.rank == 0 or not isinstance(fault, SharedFault))
    else:
        alarm.close()
        code = 0
    finally:
        leave_folders()
    _leave_group(code)
    return code


def _log(warnings: list[str], notes: list[str], rank: int) -> None:
    for warning in warnings if rank == 0 else []:
        logger.warning(warning)
    for note in notes:
        logger.info(note)


def _leave_group(code: int) -> None:
    """End the process group on all ranks, without waiting forever for one that is killed meanwhile."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    from bagel_ds.zero.process_group import end_process_group

    late = threading.Timer(_CLOSING_SECONDS, end_at_once, [code])
    late.daemon = True
    late.start()
    end_process_group()
    late.cancel()


def check_wandb_of(config: RunConfig, rank: int) -> None:
    """Raise `UserError` if the rank that logs is to use Weights & Biases and can't, before anything is loaded."""
    from bagel_ds.train.metrics.wandb import WandbOptions, check_wandb

    if rank == 0 and wandb_wanted(config):
        check_wandb(WandbOptions(offline=config.training.wandb_offline))


def _report(fault: UserError, reports: bool, prefix: str = "") -> int:
    if reports:
        print(f"ERROR: {prefix}{fault}", file=sys.stderr, flush=True)
    else:
        time.sleep(_GRACE_SECONDS)
    return 2
