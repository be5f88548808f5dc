"""Convolutions in bf16 on a CPU. What the autoencoder computes is held to recordings in tests/reference/test_vae.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_ds.model.vae import Conv2d


class Products(TorchDispatchMode):
    """Notes the dtypes of what convolutions multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.dtypes |= {args[0].dtype, args[1].dtype}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_convolution_in_bf16_equals_torchs_own_and_multiplies_in_fp32(bias: bool) -> None:
    torch.manual_seed(0)
    convolution, x = Conv2d(8, 16, 3, stride=2, bias=bias), torch.randn(2, 8, 17, 12)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        ours = convolution(x)
    rounded = [None if t is None else t.bfloat16() for t in (convolution.weight, convolution.bias)]
    expected = F.conv2d(x.bfloat16(), *rounded, stride=2)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert products.dtypes == {torch.float32}, "bf16 takes 50 times as long on a CPU without AVX-512"
    # Sums in another order may round the other way: one unit of bf16's last place, near zero one of the terms'.
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-9)


@torch.no_grad()
def test_a_convolution_in_fp32_is_torchs_own() -> None:
    torch.manual_seed(0)
    convolution, x = Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    assert torch.equal(convolution(x), F.conv2d(x, convolution.weight, convolution.bias))
