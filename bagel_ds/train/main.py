"""What the `deepspeed` launcher starts on every rank: parse, check, train, and end with an exit code.

Guarantees: a person's mistake is one message and exit code 2; anything else keeps its traceback. A fault that every
rank finds is told by rank 0 alone, one that only a host can have (its packages, its driver) by that host.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Sequence

from bagel_ds.config import RunConfig, parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.preflight import check_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; the exit code."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    try:
        config = parse_arguments(list(sys.argv[1:] if argv is None else argv))
    except UserError as fault:
        return _tell(fault, rank == 0)
    try:
        check_environment()
    except UserError as fault:
        return _tell(fault, local_rank == 0, f"host {socket.gethostname()}: " if rank else "")
    try:
        _train(config)
    except UserError as fault:
        return _tell(fault, rank == 0)
    return 0


def _train(config: RunConfig) -> None:
    # Imported here: torch and DeepSpeed take seconds, and what is above must work without them.
    import torch.distributed as dist

    from bagel_ds.train.agreement import together
    from bagel_ds.train.metrics import setup_logging
    from bagel_ds.train.setup import init_distributed
    from bagel_ds.train.trainer import Trainer

    init_distributed()
    try:
        together(lambda: setup_logging(config.training.results_dir, dist.get_rank()))
        Trainer(config).run()
    finally:
        if sys.exc_info()[0] is None or issubclass(sys.exc_info()[0], UserError):  # type: ignore[arg-type]
            dist.destroy_process_group()


def _tell(fault: UserError, speaks: bool, prefix: str = "") -> int:
    if speaks:
        print(f"ERROR: {prefix}{fault}", file=sys.stderr, flush=True)
    return 2
