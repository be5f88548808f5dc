"""Activation checkpointing, the one place that decides how a layer's activations are kept.

Guarantees: "full" keeps a layer's input and computes the rest again in the backward pass (torch's non-reentrant
checkpoint); "none" keeps everything. Values and gradients are the same either way.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Callable[..., Any]
MODES = ("none", "full")


def keep(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


def recompute(layer: nn.Module, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer(*args)
    # Nothing in a layer draws random numbers, so there is no generator state to keep.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_mode(name: str) -> Recompute:
    """`keep` for "none", `recompute` for "full"."""
    return {"none": keep, "full": recompute}[name]
