"""Activation checkpointing, the one place that decides how a layer's activations are kept.

Guarantees: "full" keeps a layer's input and computes the rest again in the backward pass (torch's non-reentrant
checkpoint); "offload" does so with the input in host memory (offload.py); "none" keeps everything. Values and gradients
are the same each way.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bagel_ds.model.offload import OffloadedInputs

Recompute = Callable[..., Any]
MODES = ("none", "full", "offload")


def keep(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


def recompute(layer: nn.Module, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer(*args)
    # Nothing in a layer draws random numbers, so there is no generator state to keep.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_mode(name: str, arena_bytes: int = 0) -> Recompute:
    """The function for one of `MODES`. With "offload" it begins with so much host memory, and takes more if need be."""
    if name == "offload":
        return OffloadedInputs(arena_bytes)
    return {"none": keep, "full": recompute}[name]
