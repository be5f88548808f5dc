"""Attention by torch's own flash kernels: `torch.nn.attention.varlen.varlen_attn` on the two calls of varlen.py.

A GPU, bf16 or fp16, head dims up to 256.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

from torch import Tensor

from bagel_ds.model.attention import flash_package
from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.attention.varlen import varlen

TITLE = "torch's varlen_attn"
unsupported = flash_package.unsupported  # the same kernels, compiled by torch


def prepare(layout: AttentionLayout) -> Attend:
    return varlen(layout, kernel)


def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepts = _parameters()
    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if "window_size" in accepts:  # torch 2.11 and newer
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if groups > 1 and "enable_gqa" in accepts:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11 promises nothing for heads that share keys
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return cast(Tensor, varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options))


@cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
