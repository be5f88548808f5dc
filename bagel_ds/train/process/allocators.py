"""Two allocators told to give memory back: the C library's, and torch's for page-locked host memory.

Guarantees: only where memory lies changes, never a result; what can't be set is left as it is and answered with False.
glibc by itself keeps freed blocks of up to 32 MiB in the heap, where loading leaves holes of up to four bytes per
parameter of a rank; torch rounds page-locked blocks up to powers of two and keeps those that are freed, which for a 7B
offloaded to host memory is tens of GiB. Call both before tensors are made.
"""

from __future__ import annotations

import ctypes
import os

import torch

from bagel_ds.memory.states import EXACT_ABOVE_MIB
from bagel_ds.units import MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE, KEPT, ARENAS = MIB, 4 * MIB, 2


def return_freed_memory() -> bool:
    """Blocks of 1 MiB or more go back to the system when they are freed. Linux with glibc; False elsewhere."""
    try:
        library = ctypes.CDLL("libc.so.6")
        settings = ((_M_MMAP_THRESHOLD, LARGE), (_M_TRIM_THRESHOLD, KEPT), (_M_ARENA_MAX, ARENAS))
        answers = [library.mallopt(name, value) for name, value in settings]
    except (OSError, AttributeError):
        return False
    return answers == [1] * len(answers)


def exact_pinned_memory(above_mib: int = EXACT_ABOVE_MIB) -> bool:
    """Page-locked blocks above this size are neither rounded up nor kept; False where this torch can't do that.

    The default leaves a pack's tensors below it. No step allocates larger ones again and again: layer inputs on the
    host have an arena (model/offload.py). What PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF) says of it wins, and
    says otherwise stays in force.
    """
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if "pinned_max_cached_size_mb" in given:
        return True
    try:
        set_allocator = torch._C._accelerator_setAllocatorSettings
        set_allocator(",".join(filter(None, [given, f"pinned_max_cached_size_mb:{above_mib}"])))
    except (AttributeError, RuntimeError, ValueError):
        return False
    return True
