"""Decides which device this run computes on, and which kernels it may use there.

Guarantees: the answer is that of DeepSpeed's `get_accelerator()`, without importing DeepSpeed. So DS_ACCELERATOR=cpu
means the CPU everywhere, whatever GPUs the host has. Only doctor/environment.py also asks torch for a GPU, to explain
why it can't be used.
"""

from __future__ import annotations

import os

ACCELERATORS = ("cuda", "cpu")  # the values of DS_ACCELERATOR that this package supports


def asked_accelerator() -> str | None:
    """The value of DS_ACCELERATOR. If it is None, a GPU is used if there is one."""
    return os.environ.get("DS_ACCELERATOR")


def device_type() -> str:
    """What this run computes on: "cuda" or "cpu"."""
    asked = asked_accelerator()
    if asked is not None:
        return "cuda" if asked == "cuda" else "cpu"
    import torch  # takes seconds, so only if the user has not decided

    return "cuda" if torch.cuda.is_available() else "cpu"


def uses_cuda() -> bool:
    return device_type() == "cuda"


def choose_kernels(precision: str) -> None:
    """Choose which CUDA kernels torch may use in this process. Call it before any work; on a CPU it changes nothing.

    cuDNN's attention, which torch prefers on H100 and newer, builds and keeps a plan for every new shape (up to three,
    because recomputation and the backward pass run in their own threads), and every pack brings about 20 new shapes.
    torch's other kernels have no plans. With precision fp32, TF32 is off: by default torch lets cuDNN's convolutions
    (the autoencoder's) round their inputs to TF32, which has 10 bits of mantissa.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
