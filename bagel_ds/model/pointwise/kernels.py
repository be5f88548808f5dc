"""What a network computes its norms, rotations and SwiGLU products with. Importing it needs no torch.

Shape legend: N rows, C width of a row, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Norm(Protocol):
    """x * factor in x's dtype, then times the weight, and factor [..., 1] = rsqrt(mean(x^2) + eps) in fp32."""

    def __call__(self, x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class NormBackward(Protocol):
    """The gradients by x and by the weight; None for one that isn't wanted (x, weight)."""

    def __call__(
        self, gradient: Tensor, x: Tensor, weight_C: Tensor, factor: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]: ...


class Rotate(Protocol):
    """Rotary embedding, first half of D against the second; `back` turns by the opposite angles."""

    def __call__(self, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, back: bool) -> Tensor: ...


class SwiGLU(Protocol):
    """silu(gate), in its dtype, times up."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...


class SwiGLUBackward(Protocol):
    """The gradients by gate and by up."""

    def __call__(self, gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]: ...


class PointwiseKernels(NamedTuple):
    """None of them changes its arguments, or returns one."""

    norm: Norm
    norm_backward: NormBackward
    rotate: Rotate
    swiglu: SwiGLU
    swiglu_backward: SwiGLUBackward


def pointwise_kernels(fused: bool) -> PointwiseKernels:
    """Both give the same results, rounded at the same places."""
    module: Any = import_module(f"bagel_ds.model.pointwise.{'fused' if fused else 'eager'}")
    kernels: PointwiseKernels = module.KERNELS
    return kernels
