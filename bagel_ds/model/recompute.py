"""Activation checkpointing: how the activations of a layer are kept for the backward pass.

Guarantees: "full" keeps a layer's input and recomputes the rest in the backward pass (torch's non-reentrant
checkpoint); "selective" also keeps the results of matrix products and attention, in as many decoder layers as memory
allows, and recomputes only what lies between; "offload" does as "full" with the input in host memory (offload.py);
"none" keeps everything. All give the same values and gradients.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Callable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bagel_ds.model.offload import OffloadedInputs

Recompute = Callable[..., Any]
MODES = ("none", "full", "offload", "selective")
# What takes most of a layer's time, by the names of torch's operators. Attention has one for each kernel.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::_varlen_attn", "flash_attn::")


def keep(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


def recompute(layer: nn.Module, *args: Any, draws: bool = False) -> Any:
    """`draws`: the layer draws random numbers, and must draw the same ones again."""
    if not torch.is_grad_enabled():
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=draws)


def recompute_between_products(layer: nn.Module, *args: Any, layers: int | None, draws: bool = False) -> Any:
    """`layers`: the last so many decoder layers keep products (None: all), the others and the ViT's as `recompute`.

    The last ones' backward passes are the first, so these products are gone when the other layers are recomputed.
    """
    after = getattr(layer, "layers_after", None)
    if not torch.is_grad_enabled() or after is None or (layers is not None and after >= layers):
        return recompute(layer, *args, draws=draws)
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)


def _keeps_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = _is_product(operator.name() if hasattr(operator, "name") else str(operator))
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_product(operator: str) -> bool:
    return operator.split(".")[0] in PRODUCTS or operator.startswith(ATTENTION)


def recompute_mode(name: str, arena_bytes: int = 0, draws: bool = False, layers: int | None = None) -> Recompute:
    """The function for one of `MODES`. `arena_bytes`: the initial host memory of "offload", which grows if needed.

    `draws` as of `recompute`, not for "offload"; `layers` as of `recompute_between_products`.
    """
    if name == "offload":
        assert not draws, "run_config.py refuses dropout with it"
        return OffloadedInputs(arena_bytes)
    modes: dict[str, Recompute] = {
        "none": keep,
        "full": partial(recompute, draws=draws),
        "selective": partial(recompute_between_products, layers=layers, draws=draws),
    }
    return modes[name]
