"""The same as eager.py, each function compiled by torch (Inductor: Triton, on a CPU C++) into one or two kernels.

Guarantees: what is compiled gets detached, contiguous tensors; modules, their hooks and autograd are no part of it. The
number of rows is a variable in a kernel, so packs of all sizes share it; widths are constants. None and one row, for
which torch would compile more kernels, go to eager.py. Intermediate results are rounded where eager.py rounds them.
Importing this module doesn't load the compiler; the first call does, which takes seconds.

Shape legend: N rows, C width of a row, T tokens, H heads, D head dim.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import FunctionType
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_ds.model.pointwise import eager
from bagel_ds.model.pointwise.kernels import PointwiseKernels


# ------------------------------------------------------------------------------------------------ what is compiled
def _norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_fp32 = x_NC.float()
    factor_N1 = torch.rsqrt((x_fp32 * x_fp32).mean(-1, keepdim=True) + eps)
    return (x_fp32 * factor_N1).to(x_NC.dtype) * weight_C, factor_N1


def _norm_backward(
    gradient_NC: Tensor, x_NC: Tensor, weight_C: Tensor, factor_N1: Tensor, trains: bool
) -> tuple[Tensor, Tensor | None]:
    x_fp32 = x_NC.float()
    product_NC = gradient_NC.float() * x_fp32
    grad_weight_C = (product_NC * factor_N1).sum(0).to(weight_C.dtype) if trains else None
    along_N1 = (product_NC * weight_C.float()).sum(-1, keepdim=True) * factor_N1 * factor_N1 / x_NC.shape[-1]
    grad_normed_NC = (gradient_NC * weight_C).float()
    return ((grad_normed_NC - x_fp32 * along_N1) * factor_N1).to(x_NC.dtype), grad_weight_C


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, back: bool) -> Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    swapped_THD = torch.cat([second, -first] if back else [-second, first], dim=-1)
    turned_THD = (x_THD * cos_TD[:, None]).float() + swapped_THD.float() * sin_TD[:, None].float()
    return turned_THD.to(x_THD.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


# ----------------------------------------------------------------------------------------------- compiling and calling
def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled function's result. What isn't a tensor is a constant in it, as dimensions behind the first are."""
    constants = tuple((x.shape[1:], x.dtype, x.device) if isinstance(x, Tensor) else x for x in arguments)
    return _compiled(function, constants)(*arguments)


@cache
def _compiled(function: Callable[..., Any], constants: tuple[Any, ...]) -> Callable[..., Any]:
    """A compiled function for these constants only: torch refuses to compile one function for more than eight."""
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        import torch._inductor.config as inductor

        # Else each rank starts up to 32 processes for a dozen small kernels. They start when torch imports them, before
        # it reads the options of a call. Torch keeps such settings for each thread.
        inductor.compile_threads = options["compile_threads"] = 1
    # What torch warns of without a CUDA toolkit is about powers, of which there are none here.
    warnings.filterwarnings("ignore", message=".*libdevice")
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, options=options)


def _plain(x: Tensor) -> Tensor:
    """Detached, contiguous, with a first dimension of any length from 2."""
    x = x.detach().contiguous()
    torch._dynamo.mark_dynamic(x, 0)
    return x


def _rows(x: Tensor) -> Tensor:
    return _plain(x.reshape(-1, x.shape[-1]))


def _flat(x: Tensor) -> Tensor:
    return _plain(x.reshape(-1))


def _is_small(x: Tensor) -> bool:
    return x.numel() < 2 * x.shape[-1]


# ------------------------------------------------------------------------------------------------------- the functions
def norm(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _is_small(x):
        return eager.norm(x, weight_C, eps)
    normed, factor = _call(_norm, _rows(x), weight_C.detach(), eps)
    return normed.view(x.shape), factor.view(*x.shape[:-1], 1)


def norm_backward(
    gradient: Tensor, x: Tensor, weight_C: Tensor, factor: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    if _is_small(x) or not wanted[0]:  # the latter only where nothing below the norm trains
        return eager.norm_backward(gradient, x, weight_C, factor, wanted)
    grad_x, grad_weight = _call(_norm_backward, _rows(gradient), _rows(x), weight_C.detach(), _rows(factor), wanted[1])
    return grad_x.view(x.shape), grad_weight


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, back: bool) -> Tensor:
    if len(x_THD) < 2:
        return eager.rotate(x_THD, cos_TD, sin_TD, back)
    rotated: Tensor = _call(_rotate, _plain(x_THD), _plain(cos_TD), _plain(sin_TD), back)
    return rotated


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if _is_small(gate):
        return eager.swiglu(gate, up)
    product: Tensor = _call(_swiglu, _flat(gate), _flat(up))
    return product.view(gate.shape)


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if _is_small(gate):
        return eager.swiglu_backward(gradient, gate, up)
    grad_gate, grad_up = _call(_swiglu_backward, _flat(gradient), _flat(gate), _flat(up))
    return grad_gate.view(gate.shape), grad_up.view(gate.shape)


KERNELS = PointwiseKernels(norm, norm_backward, rotate, swiglu, swiglu_backward)
