"""Activation checkpointing: how the activations of a layer are kept for the backward pass.

Guarantees: "full" keeps a layer's input and recomputes the rest in the backward pass (torch's non-reentrant
checkpoint); "offload" does the same with the input in host memory (offload.py); "none" keeps everything. All three give
the same values and gradients.
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
    # No layer draws random numbers, so there is no generator state to restore.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_mode(name: str, arena_bytes: int = 0) -> Recompute:
    """The function for one of `MODES`. `arena_bytes`: the initial host memory of "offload", which grows if needed."""
    if name == "offload":
        return OffloadedInputs(arena_bytes)
    return {"none": keep, "full": recompute}[name]
