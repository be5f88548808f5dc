"""Activation checkpointing: how the activations of a layer are kept for the backward pass.

Guarantees: "full" keeps a layer's input and recomputes the rest in the backward pass (torch's non-reentrant
checkpoint); "offload" does the same with the input in host memory (offload.py); "none" keeps everything. All three give
the same values and gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bagel_ds.model.offload import OffloadedInputs

Recompute = Callable[..., Any]
MODES = ("none", "full", "offload")


def keep(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


def recompute(layer: nn.Module, *args: Any, draws: bool = False) -> Any:
    """`draws`: the layer draws random numbers, and must draw the same ones again."""
    if not torch.is_grad_enabled():
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=draws)


def recompute_mode(name: str, arena_bytes: int = 0, draws: bool = False) -> Recompute:
    """The function for one of `MODES`. `arena_bytes`: the initial host memory of "offload", which grows if needed.

    `draws` as of `recompute`; not for "offload".
    """
    if name == "offload":
        assert not draws, "run_config.py refuses dropout with it"
        return OffloadedInputs(arena_bytes)
    modes: dict[str, Recompute] = {"none": keep, "full": partial(recompute, draws=draws)}
    return modes[name]
