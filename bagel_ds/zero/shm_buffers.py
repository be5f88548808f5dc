"""The buffers in /dev/shm through which DeepSpeed sums over the ranks of a host on the CPU. It never removes them.

Guarantees: a run removes the names of its own buffers (66 MiB per rank) once all ranks have mapped them, so that the
kernel frees them with the last rank, however that ends. Buffers that killed runs or other programs of this user have
left are removed at a start if no running process has them open or mapped. Young ones stay: they may belong to ranks in
another container that are about to map them.
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
    """Make DeepSpeed sum through gloo. All ranks of a host must decide the same, or they wait for each other."""
    import deepspeed

    deepspeed.ops.__compatible_ops__[SUMS.name] = False


def remove_own_buffers(folder: Path = FOLDER) -> None:
    """Remove the names of this run's buffers. Call when all ranks have joined: they open the buffers only once."""
    meeting = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    for path in _buffers(folder):
        if path.name.rpartition("_")[0] == f"{_NAME}_{os.getuid()}_{meeting}":
            path.unlink(missing_ok=True)


def remove_stale_buffers(folder: Path = FOLDER) -> list[Path]:
    """Remove this user's buffers that no running process has open or mapped, and return them."""
    removed, mapped = [], _mapped_inodes()
    for path in _buffers(folder):
        if _is_old(path, mapped) and not is_open_somewhere(path):
            path.unlink(missing_ok=True)
            removed.append(path)
    if removed:
        logger.info("removed %d buffers from %s, left by runs that have ended", len(removed), folder)
    return removed


def _buffers(folder: Path) -> list[Path]:
    """This user's buffers; DeepSpeed names them <name>_<user id>_<address>_<port>_<rank>."""
    name = re.compile(rf"{_NAME}_{os.getuid()}_.*_\d+_\d+")
    return [path for path in folder.glob(f"{_NAME}_*") if name.fullmatch(path.name) and path.is_file()]


def _is_old(path: Path, mapped: set[int]) -> bool:
    """Whether it was last written minutes ago and is not mapped."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_ino not in mapped and time.time() - found.st_mtime > _YOUNG_SECONDS


def _mapped_inodes() -> set[int]:
    """Inodes of the buffers that running processes have mapped."""
    inodes = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # the process has ended, or is another user's
            continue
        inodes |= {int(line.split()[4]) for line in lines if _NAME in line}
    return inodes
