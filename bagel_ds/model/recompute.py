"""Activation checkpointing, the one place that decides how a layer's activations are kept.

Guarantees: "full" keeps a layer's input and computes the rest again in the backward pass (torch's non-reentrant
checkpoint); "offload" does so with the input in pinned CPU memory; "none" keeps everything. Values and gradients are
the same each way.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Recompute = Callable[..., Any]
MODES = ("none", "full", "offload")


def keep(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


def recompute(layer: nn.Module, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer(*args)
    # Nothing in a layer draws random numbers, so there is no generator state to keep.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_offloaded(layer: nn.Module, *args: Any) -> Any:
    """`recompute`, with the tensors among `args` on the host between the forward and the backward pass.

    Only activations go there: tensors that do not take part in the gradient (rotary tables inside the geometry) stay.
    """
    if not torch.is_grad_enabled():
        return layer(*args)
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))

    def from_host(*on_host: Any) -> Any:
        return layer(*(_Move.apply(arg, device) if isinstance(arg, Tensor) else arg for arg in on_host))

    host = torch.device("cpu")
    on_host = [_Move.apply(arg, host) if isinstance(arg, Tensor) else arg for arg in args]
    return checkpoint(from_host, *on_host, use_reentrant=False, preserve_rng_state=False)


class _Move(torch.autograd.Function):
    """A copy to another device, through pinned memory on the host; the gradient takes the way back.

    Copies both ways run on the current stream, in order, so none has to be waited for: nothing reads the host's side
    but a later copy.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.source = tensor.device
        return _copied(tensor, device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _copied(gradients[0], ctx.source), None


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu" and tensor.is_cuda:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True, copy=True)


def recompute_mode(name: str) -> Recompute:
    """The function for one of `MODES`."""
    return {"none": keep, "full": recompute, "offload": recompute_offloaded}[name]
