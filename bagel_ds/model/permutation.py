"""Rows of a tensor in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def permuted(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x[index] along the first dimension, where `index` [N] names every row once and `inverse` [N] undoes it."""
    found: Tensor = _Permuted.apply(x, index, inverse)
    return found


class _Permuted(torch.autograd.Function):
    """Its backward pass is a gather too, where torch's own sorts the index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.inverse), None, None
