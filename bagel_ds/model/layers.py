"""Building blocks whose weights are always read from a checkpoint.

Guarantees: construction only allocates memory (no random initialization), so that a 14.6 B model under `zero.Init` is
not filled twice. Load a weight before you use it.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_ds.model.pointwise.eager import KERNELS as EAGER
from bagel_ds.model.pointwise.kernels import PointwiseKernels
from bagel_ds.model.shape.lora import LoRA


class Linear(nn.Linear):
    """A linear layer, with an adapter beside its weight once `add_adapter` was called."""

    lora: LoRA | None = None

    def reset_parameters(self) -> None:
        """Does nothing: the checkpoint fills it."""

    def add_adapter(self, lora: LoRA) -> None:
        """Give the layer `lora_A` [rank, inputs] and `lora_B` [outputs, rank], which are not initialized here."""
        self.lora = lora
        self.lora_A = nn.Parameter(torch.empty(lora.rank, self.in_features))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, lora.rank))

    def base(self, x: Tensor) -> Tensor:
        """The layer without its adapter."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        y = self.base(x)
        if self.lora is None:
            return y
        dropped = F.dropout(x, self.lora.dropout, self.training)
        return add_low_rank(y, dropped, self.lora_A, self.lora_B, self.lora.scale)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * x A^T B^T: [N, outputs], from x [N, inputs], A [rank, inputs] and B [outputs, rank]."""
    return torch.addmm(y, F.linear(x, a), b.T, alpha=scale)  # without a second tensor of y's size


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Does nothing: the checkpoint fills it."""


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) in fp32, back to the input's dtype, then times the weight (in this order)."""

    def __init__(self, width: int, eps: float, kernels: PointwiseKernels = EAGER):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        """[..., width], in the weight's dtype."""
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.kernels)
        return normed


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and each row's factor, where torch's own would keep four tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: PointwiseKernels) -> Tensor:
        normed, factor = kernels.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        ctx.kernels = kernels
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        return *ctx.kernels.norm_backward(gradient, *ctx.saved_tensors, wanted), None, None


class GELUMLP(nn.Module):
    """fc1 -> gelu (tanh approximation) -> fc2: SigLIP's MLP and BAGEL's connector."""

    def __init__(self, width_in: int, hidden: int, width_out: int):
        super().__init__()
        self.fc1 = Linear(width_in, hidden)
        self.fc2 = Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases: Qwen2's MLP."""

    def __init__(
        self,
        width: int,
        hidden: int,
        linear: Callable[..., Linear] = Linear,
        kernels: PointwiseKernels = EAGER,
    ):
        super().__init__()
        self.gate_proj = linear(width, hidden, bias=False)
        self.up_proj = linear(width, hidden, bias=False)
        self.down_proj = linear(hidden, width, bias=False)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.kernels))


def swiglu(gate: Tensor, up: Tensor, kernels: PointwiseKernels = EAGER) -> Tensor:
    """silu(gate) * up."""
    product: Tensor = _SwiGLU.apply(gate, up, kernels)
    return product


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up, and computes silu(gate) again, which torch's own would also keep."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: PointwiseKernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return *ctx.kernels.swiglu_backward(gradient, *ctx.saved_tensors), None
