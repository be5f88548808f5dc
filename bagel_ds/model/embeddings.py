"""Position tables and the timestep embedding.

Guarantees: the sin-cos tables depend only on width and side, so they are computed and never loaded; they equal those in
a checkpoint of the same side. Computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_ds.model.layers import Linear
from bagel_ds.model.pointwise.eager import KERNELS as EAGER
from bagel_ds.model.pointwise.kernels import PointwiseKernels
from bagel_ds.model.shape.config import FREQUENCIES


def position_table(width: int, side: int) -> Tensor:
    """[side*side, width] float32, row r = row*side + column; quarters sin(x), cos(x), sin(y), cos(y), x the column.

    w_k = 10000^(-k/(width/4)). Source: MAE's 2-D sin-cos embedding, column first.
    """
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.arange(side, dtype=np.float64)[:, None] * omega
    one_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, width/2]
    columns = np.tile(one_axis, (side, 1))
    rows = np.repeat(one_axis, side, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()


class PositionTable(nn.Module):
    """A frozen `position_table`, looked up by id. A parameter, because checkpoints hold it."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.width, self.side = width, side
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        return F.embedding(position_ids, self.pos_embed)


class TimestepEmbedder(nn.Module):
    """t in [0, 1] (not times 1000) -> [cos(t f), sin(t f)] -> Linear -> SiLU -> Linear; f_i = 10000^(-i/128)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t: [G] float32. Returns [G, width] in the weights' dtype."""
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        first: Linear = self.mlp[0]  # type: ignore[assignment]
        return self.mlp(sinusoid.to(first.weight.dtype))


def rope_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, head_dim] in `dtype`; angles are computed in fp32 in every precision."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, kernels: PointwiseKernels = EAGER) -> Tensor:
    """Rotary embedding, rotate-half form (first half against second half); tables from `rope_tables`."""
    rotated: Tensor = _Rotated.apply(x_THD, cos_TD, sin_TD, kernels)
    return rotated


class _Rotated(torch.autograd.Function):
    """Its backward pass turns by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, kernels: PointwiseKernels) -> Tensor:
        ctx.tables, ctx.kernels = (cos_TD, sin_TD), kernels
        return kernels.rotate(x_THD, cos_TD, sin_TD, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.kernels.rotate(gradient, *ctx.tables, back=True), None, None, None
