"""Memory that runs out is one message, however it is reported; other errors stay what they are."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bagel_ds.train.process.out_of_memory import memory_fault, shortage
from bagel_ds.units import GIB

# As torch 2.13, NCCL 2.27 and the system word them.
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
NCCL_CALLOC = NCCL.replace("Cuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes")
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "81788928 bytes. Error code 12 (Cannot allocate memory)"
)
REPORTS: dict[str, tuple[BaseException, str, str]] = {
    "torch": (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nmore"), "GPU memory", "Tried 9 GiB."),
    "nccl": (dist.DistBackendError(NCCL), "GPU memory", "Cuda failure 2 'out of memory'"),
    "nccl_calloc": (dist.DistBackendError(NCCL_CALLOC), "GPU memory", "Failed to CUDA calloc async 608 bytes"),
    "cublas": (RuntimeError(CUBLAS), "GPU memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    "cublas_handle": (
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        "GPU memory",
        "CUBLAS_STATUS_NOT_INITIALIZED",
    ),
    "cudnn": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "GPU memory", "CUDNN_STATUS_ALLOC_FAILED"),
    "cusolver": (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), "GPU memory", "CUSOLVER"),
    "driver": (
        RuntimeError("CUDA driver error: out of memory"),
        "GPU memory or page-locked host memory",
        "driver error",
    ),
    "runtime": (
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        "GPU memory or page-locked host memory",
        "CUDA error: out of memory.",
    ),
    "pinned": (RuntimeError("cudaHostAlloc(&ptr, size, flags) failed"), "page-locked host memory", "cudaHostAlloc"),
    "registered": (RuntimeError("cudaHostRegister failed: out of memory"), "page-locked host memory", "Register"),
    "python": (MemoryError(), "host memory", "MemoryError."),
    "numpy": (MemoryError("Unable to allocate 3.2 GiB for an array"), "host memory", "Unable to allocate 3.2 GiB"),
    "cpu_allocator": (RuntimeError(CPU_ALLOCATOR), "host memory", "you tried to allocate 81788928 bytes"),
    "shared_memory": (
        RuntimeError("unable to mmap 512 bytes from file </torch_1>: Cannot allocate memory (12)"),
        "host memory",
        "unable to mmap",
    ),
    "bad_alloc": (RuntimeError("std::bad_alloc"), "host memory", "std::bad_alloc"),
    "system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "host memory", "Cannot allocate memory"),
}


def plan() -> Any:
    return SimpleNamespace(gpu_peak=3 * GIB, host_peak=40 * GIB)


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_of_memory_that_ran_out_is_a_message(name: str) -> None:
    error, memory, words = REPORTS[name]
    message = str(memory_fault(error, 1024, plan()))
    assert message.startswith(f"out of {memory}") and words in message
    assert "outside a step" in message and "`bagel-ds memory` compares them" in message
    assert "\n" not in message
    assert ("a peak of 3.0 GiB on the GPU" in message) is ("GPU" in memory)
    assert ("40.0 GiB on this host" in message) is ("host" in memory)


def test_what_it_came_from_counts_too() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the engine could not be made") from error
    except RuntimeError as error:
        assert memory_fault(error, 1024) is not None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("the dataset is called out of memory"),
        KeyError("out of memory"),
    ],
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert shortage(error) is None and memory_fault(error, 1024, plan()) is None


def test_within_a_step_the_longest_pack_and_the_remedies_are_named() -> None:
    packs: list[Any] = [
        SimpleNamespace(sequence_length=n, vae_indexes=range(20), vit_seqlens=(4, 2), images=(0,), samples=(name,))
        for n, name in ((7, "t2i: a.parquet row group 0 row 1"), (900, "vlm: the longest"))
    ]
    message = str(memory_fault(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), 1024, plan(), packs))
    for words in (
        "out of GPU memory: CUDA out of memory. Tried 2 GiB. The longest pack of this rank had 900 tokens (20 latent",
        "6 ViT; 1 images to draw, 2 to read): vlm: the longest.",
        "a peak of 3.0 GiB on the GPU for packs of that limit",
        "Lower --max_num_tokens (now 1,024)",
    ):
        assert words in message
    assert "more" not in message.replace("more off the GPU", "") and "a.parquet" not in message
