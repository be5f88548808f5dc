"""Which device this run computes on, in one place, and the kernels it may use there.

Guarantees: the answer is that of DeepSpeed's `get_accelerator()` without importing it, so that DS_ACCELERATOR=cpu means
the CPU in every part of the program, whatever GPUs the host has. Nothing else asks torch whether there is a GPU, but
doctor/environment.py, which says why one can't be used.
"""

from __future__ import annotations

import os

ACCELERATORS = ("cuda", "cpu")  # what DS_ACCELERATOR may say here


def asked_accelerator() -> str | None:
    """What DS_ACCELERATOR says; None where it is not set, and a GPU is used if there is one."""
    return os.environ.get("DS_ACCELERATOR")


def device_type() -> str:
    """What this run computes on: "cuda" or "cpu"."""
    asked = asked_accelerator()
    if asked is not None:
        return "cuda" if asked == "cuda" else "cpu"
    import torch  # takes seconds, and is not needed where the user has decided

    return "cuda" if torch.cuda.is_available() else "cpu"


def uses_cuda() -> bool:
    return device_type() == "cuda"


def choose_kernels(precision: str) -> None:
    """Settle for this process which CUDA kernels torch may take; on a CPU it changes nothing. Call before any work.

    cuDNN's attention, which torch prefers on H100 and newer, builds a plan for every new shape (up to three times, as
    recomputation and the backward pass run in threads of their own) and keeps all of them, while every pack brings
    about 20 new shapes; torch's other kernels have no plans. fp32 means fp32: by itself torch lets cuDNN's convolutions
    (the autoencoder's) round their inputs to TF32, which has 10 bits of mantissa.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
