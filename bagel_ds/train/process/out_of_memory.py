"""Out-of-memory errors of torch, NCCL, CUDA's libraries and the host.

Guarantees: each becomes one message with the kind of memory that ran out, what this rank was doing, and what to lower.
Other errors stay as they are.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bagel_ds.errors import UserError
from bagel_ds.memory.planner import MemoryPlan
from bagel_ds.model.batch import PackedBatch
from bagel_ds.units import GIB

GPU, HOST, PINNED = "GPU memory", "host memory", "page-locked host memory"
EITHER = f"{GPU} or {PINNED}"

# In this order; a RuntimeError that matches none of them is another error.
_SIGNS = (
    (re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory|bad_alloc", re.IGNORECASE), HOST),
    (re.compile(r"cudaHost(Alloc|Register)|cudaMallocHost|cuMemHostAlloc", re.IGNORECASE), PINNED),
    (re.compile(r"\bCU[A-Z]+_(STATUS_)?ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate"), GPU),
    (re.compile(r"Failed to CUDA (malloc|calloc)", re.IGNORECASE), GPU),
    (re.compile(r"CUDA out of memory|CUDA error: out of memory|CUDA driver error: out of memory"), EITHER),
    (re.compile(r"out[ _]of[ _]memory|cudaErrorMemoryAllocation", re.IGNORECASE), GPU),
)


class Shortage(NamedTuple):
    memory: str  # that ran out
    words: str  # of the error, in one line


def shortage(error: BaseException) -> Shortage | None:
    """The memory that ran out according to an error or its causes; None if it is another error."""
    return next((found for each in _chain(error) if (found := _shortage(each)) is not None), None)


def memory_fault(
    error: BaseException,
    max_num_tokens: int,
    plan: MemoryPlan | None = None,
    window: Sequence[PackedBatch] = (),
) -> UserError | None:
    """The message for an out-of-memory error, or None for another error.

    `window` holds the packs of the step in which it happened, `plan` what was expected, if known.
    """
    found = shortage(error)
    if found is None:
        return None
    where = "" if window else " outside a step"
    parts = [f"out of {found.memory}{where}: {found.words}"]
    if window:
        parts.append(_longest(window))
    if plan is not None:
        parts.append(_expected(found.memory, plan))
    parts.append(_remedy(found.memory, max_num_tokens))
    return UserError(" ".join(parts))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _shortage(error: BaseException) -> Shortage | None:
    lines = [" ".join(line.split()) for line in str(error).splitlines()] or [""]
    if isinstance(error, torch.OutOfMemoryError):
        return Shortage(GPU, lines[0])
    if isinstance(error, MemoryError):
        return Shortage(HOST, lines[0] or "MemoryError.")
    if isinstance(error, OSError):
        return Shortage(HOST, lines[0]) if error.errno == errno.ENOMEM else None
    if not isinstance(error, RuntimeError):
        return None
    for sign, memory in _SIGNS:
        for line in lines:
            if sign.search(line):
                return Shortage(memory, line if line.endswith(".") else line + ".")
    return None


def _longest(window: Sequence[PackedBatch]) -> str:
    longest = max(window, key=lambda batch: batch.sequence_length)
    return (
        f"The longest pack of this rank had {longest.sequence_length:,} tokens ({len(longest.vae_indexes):,} latent, "
        f"{sum(longest.vit_seqlens):,} ViT; {len(longest.images)} images to draw, {len(longest.vit_seqlens)} to read): "
        f"{'; '.join(longest.samples)}."
    )


def _expected(memory: str, plan: MemoryPlan) -> str:
    peaks = [("on the GPU", plan.gpu_peak)] if "GPU" in memory else []
    peaks += [("on this host", plan.host_peak)] if "host" in memory else []
    shown = " and ".join(f"{peak / GIB:.1f} GiB {where}" for where, peak in peaks)
    return f"The planner expected a peak of {shown} for packs of that limit."


def _remedy(memory: str, max_num_tokens: int) -> str:
    of_gpu = (
        f"Lower --max_num_tokens (now {max_num_tokens:,}), or use a --ds_config that keeps more off the GPU "
        "(`bagel-ds memory` compares them)."
    )
    of_host = (
        "Lower --num_workers or --prefetch_factor, or use a --ds_config that keeps less in RAM (`bagel-ds memory` "
        "compares them)."
    )
    return of_gpu if memory == GPU else of_host if memory != EITHER else f"{of_gpu} For the host: {of_host}"
