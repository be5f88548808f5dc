"""Buffers in /dev/shm by which DeepSpeed's ranks on one host add up on the CPU, 66 MiB each, which it never removes.

Guarantees: a run's own buffers have no name any more once all ranks have mapped them, so that the kernel frees them
with the last rank, however that ends. Those left by runs that were killed before that, or by other programs of this
user, go away at a start when no living process has them open or mapped; young ones stay, as they may be those of ranks
in another container that are just finding each other.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

from bagel_ds.units import MIB
from bagel_ds.zero.ops import Op, is_open_somewhere, load_op

logger = logging.getLogger("bagel_ds")

FOLDER = Path("/dev/shm")
_NAME = "deepspeed_allreduce_buffer"  # + user id, address, port, rank (deepspeed/ops/csrc/cpu/comm/shm.cpp)
_YOUNG_SECONDS = 300.0

BUFFER_BYTES = 66 * MIB  # of one rank, written at once
SUMS = Op("deepspeed_shm_comm", "sums over ranks on the CPU", "", lambda: load_op("ShareMemCommBuilder"))


def leave_out_sums() -> None:
    """Have DeepSpeed add up through gloo. Every rank of the host must decide the same, or they wait for each other."""
    import deepspeed

    deepspeed.ops.__compatible_ops__[SUMS.name] = False


def remove_own_buffers(folder: Path = FOLDER) -> None:
    """Remove the names of this run's buffers. Call when every rank has joined: ranks find them by name only once."""
    meeting = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    for path in _buffers(folder):
        if path.name.rpartition("_")[0] == f"{_NAME}_{os.getuid()}_{meeting}":
            path.unlink(missing_ok=True)


def remove_stale_buffers(folder: Path = FOLDER) -> list[Path]:
    """Remove this user's buffers that no living process has open or maps; returns them."""
    removed, mapped = [], _mapped_inodes()
    for path in _buffers(folder):
        if _is_old(path, mapped) and not is_open_somewhere(path):
            path.unlink(missing_ok=True)
            removed.append(path)
    if removed:
        logger.info("removed %d buffers from %s, left by runs that have ended", len(removed), folder)
    return removed


def _buffers(folder: Path) -> list[Path]:
    """This user's: DeepSpeed names them <name>_<user id>_<address>_<port>_<rank>."""
    name = re.compile(rf"{_NAME}_{os.getuid()}_.*_\d+_\d+")
    return [path for path in folder.glob(f"{_NAME}_*") if name.fullmatch(path.name) and path.is_file()]


def _is_old(path: Path, mapped: set[int]) -> bool:
    """Whether it was last written a while ago and is not among the inodes that are mapped."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_ino not in mapped and time.time() - found.st_mtime > _YOUNG_SECONDS


def _mapped_inodes() -> set[int]:
    """Inodes of the buffers in living processes' memory."""
    inodes = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # it has ended, or is another user's
            continue
        inodes |= {int(line.split()[4]) for line in lines if _NAME in line}
    return inodes
