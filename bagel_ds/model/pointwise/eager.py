"""By torch's own kernels, with few temporary tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_ds.model.pointwise.kernels import PointwiseKernels


def norm(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_fp32 = x.float()
    factor = torch.linalg.vecdot(x_fp32, x_fp32).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    normed = x_fp32 * factor
    in_fp32 = x.dtype == weight_C.dtype == torch.float32
    return normed.mul_(weight_C) if in_fp32 else normed.to(x.dtype) * weight_C, factor


def norm_backward(
    gradient: Tensor, x: Tensor, weight_C: Tensor, factor: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    x_fp32, width = x.float(), x.shape[-1]
    product = gradient * x_fp32  # fp32
    grad_weight = grad_x = None
    if wanted[1]:
        rows = product.reshape(-1, width)
        grad_weight = (rows.T @ factor.reshape(-1)).to(weight_C.dtype)
    if wanted[0]:
        along = (product @ weight_C.float()).unsqueeze(-1)
        grad_x = torch.mul(gradient, weight_C, out=product if x.dtype == torch.float32 else None).float()
        grad_x = grad_x.addcmul_(x_fp32, along.mul_(factor).mul_(factor).div_(-width)).mul_(factor).to(x.dtype)
    return grad_x, grad_weight


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, back: bool) -> Tensor:
    half, direction = x_THD.shape[-1] // 2, -1.0 if back else 1.0
    sin_T1D = sin_TD[:, None, :half]  # both halves of the tables are equal
    rotated = x_THD * cos_TD[:, None]
    rotated[..., :half].addcmul_(x_THD[..., half:], sin_T1D, value=-direction)
    rotated[..., half:].addcmul_(x_THD[..., :half], sin_T1D, value=direction)
    return rotated


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_silu = gradient * up
    grad_gate = torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_silu)
    return grad_gate, F.silu(gate).mul_(gradient)


KERNELS = PointwiseKernels(norm, norm_backward, rotate, swiglu, swiglu_backward)
