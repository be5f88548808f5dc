"""Attention by the flash-attn package: `flash_attn_varlen_func` on the two calls of varlen.py.

A GPU, bf16 or fp16, head dims up to 256. The package isn't a dependency (`pip install bagel_ds[flash]`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.attention.varlen import varlen

TITLE = "flash-attn"


def prepare(layout: AttentionLayout) -> Attend:
    return varlen(layout, kernel)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, trains: bool) -> str | None:
    """Why the kernel can't take these; None where it should."""
    if device.type != "cuda":
        return "it computes on a GPU only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head dims that are multiples of 8 up to 256, not {head_dim}"
    return None


def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # built for one torch; choice.py tries it

    output: Tensor = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal)
    return output
