"""The normalization, the rotary embedding and SwiGLU have the values and gradients of their plain forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bagel_ds.model.embeddings import apply_rope, rope_tables
from bagel_ds.model.layers import RMSNorm, swiglu

SHAPES = [(0, 8), (1, 8), (33, 64), (17, 3, 16)]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_fp32 = x.float() if x.dtype != torch.float64 else x
    return weight * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3
    return values.to(dtype).requires_grad_()


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_equals_its_plain_form(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    norm, x, weights = norm_of(shape[-1], dtype), drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype).detach()
    found, expected = norm(x), plain_norm(x, norm.weight, norm.eps)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)
    ours, plain = (torch.autograd.grad((each * weights).sum(), (x, norm.weight)) for each in (found, expected))
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert float((one - other).detach().norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    norm, x = norm_of(8, torch.float32), drawn(5, 8)
    (x if frozen == "input" else norm.weight).requires_grad_(False)
    norm(x).sum().backward()
    assert (x.grad is None) == (frozen == "input") and (norm.weight.grad is None) == (frozen == "weight")


def test_a_norm_keeps_its_input_and_no_copy_of_it() -> None:
    norm, x = norm_of(64, torch.bfloat16), drawn(33, 64, dtype=torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr()):
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    assert sum(kept) == 33 * 4


def test_a_norm_takes_tensors_in_any_order_in_memory() -> None:
    norm, x, weights = norm_of(16, torch.float32), drawn(17, 3, 16), drawn(17, 3, 16).detach()
    results = []
    for order in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        inputs = order(x.detach()).requires_grad_()
        results.append(torch.autograd.grad(norm(inputs), (inputs, norm.weight), order(weights)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 29])
def test_swiglu_is_its_plain_form_to_the_last_bit(rows: int, dtype: torch.dtype) -> None:
    gate, up, weights = drawn(rows, 24, dtype=dtype), drawn(rows, 24, dtype=dtype), drawn(rows, 24, dtype=dtype)
    found, expected = swiglu(gate, up), torch.nn.functional.silu(gate) * up
    assert torch.equal(found, expected)
    ours, plain = (torch.autograd.grad(each, (gate, up), weights.detach()) for each in (found, expected))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_swiglu_keeps_its_inputs_and_nothing_else() -> None:
    gate, up = drawn(33, 24), drawn(33, 24)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens", [0, 1, 29])
def test_a_rotation_equals_its_plain_form(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weights = drawn(tokens, 3, 16, dtype=dtype), drawn(tokens, 3, 16, dtype=dtype).detach()
    cos, sin = rope_tables(torch.arange(tokens) * 7, 16, 1e6, dtype)
    first, second = x.chunk(2, dim=-1)
    expected = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    found = apply_rope(x, cos, sin)
    assert found.dtype == dtype
    ours, plain = (torch.autograd.grad((each * weights).sum(), x)[0] for each in (found, expected))
    for one, other in ((found, expected), (ours, plain)):
        assert float((one - other).detach().norm()) <= tolerance * float(other.detach().norm())
