"""Settings of three allocators: the C library's, and torch's for page-locked host memory and for GPUs.

Guarantees: settings change only where memory lies, never a result; what can't be set, or is set by the user, stays as
it is. By default glibc keeps freed blocks of up to 32 MiB in the heap, where loading leaves holes of up to four bytes
per parameter of a rank. torch rounds page-locked blocks up to powers of two and caches freed ones, which for a 7B
offloaded to host memory is tens of GiB. On the GPU it takes segments that can't grow, so that packs of many shapes
leave holes in them. Call the setters before tensors are made.
"""

from __future__ import annotations

import ctypes
import os

import torch

from bagel_ds.memory.states import EXACT_ABOVE_MIB
from bagel_ds.units import MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE, KEPT, ARENAS = MIB, 4 * MIB, 2
_PINNED_LIMIT = "pinned_max_cached_size_mb"
_EXPANDABLE = "expandable_segments"

_rounds_pinned_memory = True  # torch's default
_settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""


def return_freed_memory() -> bool:
    """Have freed blocks of 1 MiB or more returned to the system. Linux with glibc; False elsewhere."""
    try:
        library = ctypes.CDLL("libc.so.6")
        settings = ((_M_MMAP_THRESHOLD, LARGE), (_M_TRIM_THRESHOLD, KEPT), (_M_ARENA_MAX, ARENAS))
        answers = [library.mallopt(name, value) for name, value in settings]
    except (OSError, AttributeError):
        return False
    return answers == [1] * len(answers)


def exact_pinned_memory(above_mib: int = EXACT_ABOVE_MIB) -> None:
    """Have page-locked blocks above this size neither rounded up nor cached, if this torch can do that.

    The default leaves a pack's tensors below it. No step allocates larger blocks again and again: layer inputs on the
    host have an arena (model/offload.py). PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF) takes precedence.
    """
    global _rounds_pinned_memory
    _rounds_pinned_memory = not _set_unless_given(_PINNED_LIMIT, str(above_mib))


def expandable_segments() -> bool:
    """Have a GPU's memory in segments that grow, so that little of it is lost in holes; whether torch takes it.

    With another value in PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF) that one stays.
    """
    return _set_unless_given(_EXPANDABLE, "True")


def _set_unless_given(name: str, value: str) -> bool:
    """Set `name` of torch's allocators beside what is set; whether it is now set, here or by the user."""
    global _settings
    if name not in _settings:
        settings = ",".join(filter(None, [_settings, f"{name}:{value}"]))
        try:
            torch._C._accelerator_setAllocatorSettings(settings)
        except (AttributeError, RuntimeError, ValueError):
            return False
        _settings = settings
    return True


def rounds_pinned_memory() -> bool:
    """Whether torch rounds large page-locked blocks up, because `exact_pinned_memory` could not prevent it."""
    return _rounds_pinned_memory
