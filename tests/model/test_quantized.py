"""Weights in 4 and 8 bits: their values, what a layer computes and learns with them, and what it holds in memory."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_ds.model import quantized
from bagel_ds.model.layers import Linear
from bagel_ds.model.quantized import NF4, QuantizedLinear, dequantize, quantize
from bagel_ds.model.shape.lora import LoRA
from bagel_ds.model.shape.quantization import PIECE, QUANTIZATIONS, Quantization, work_bytes
from tests.live_tensors import LiveTensors

FORMATS = list(QUANTIZATIONS.values())
# Of a normal distribution: for int8 half a step of 1/127 of a block's largest value, uniformly spread.
ERRORS = {"nf4": (0.085, 0.1), "int8": (0.006, 0.007)}


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_bitsandbytes", lambda device: None)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def there_and_back(weight: Tensor, quantization: Quantization, dtype: torch.dtype = torch.float32) -> Tensor:
    codes, absmax = quantize(weight.flatten(), quantization)
    assert len(codes) == quantization.codes(weight.numel()) and len(absmax) == quantization.blocks(weight.numel())
    return dequantize(codes, absmax, quantization, (weight.shape[0], weight.shape[1]), dtype)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda quantization: quantization.name)
@pytest.mark.parametrize("shape", [(64, 64), (7, 3), (1, 1), (100, 37), (1025, 4100)], ids=str)
def test_every_value_is_the_level_nearest_to_the_weight(
    shape: tuple[int, int], quantization: Quantization, without_kernel: None
) -> None:
    """Also in several pieces, and where the last block or byte is not full."""
    weight = normal(*shape)
    found = there_and_back(weight, quantization)
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % quantization.block)).view(-1, quantization.block)
    levels = torch.tensor(NF4) if quantization.name == "nf4" else torch.arange(-127, 128) / 127
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    relative = (found - weight.float()).abs().flatten() / absmax.expand_as(blocks).flatten()[: weight.numel()]
    if len(blocks) < 1000:  # none of the levels is nearer than the one that was taken
        least = (blocks / absmax).unsqueeze(-1).sub(levels).abs().amin(-1).flatten()[: weight.numel()]
        torch.testing.assert_close(relative, least, rtol=0, atol=1e-6)
    assert (weight.numel() > PIECE) == (shape == (1025, 4100))
    if weight.numel() > 10**6:
        low, high = ERRORS[quantization.name]
        assert low < float((found - weight.float()).norm() / weight.float().norm()) < high
        assert torch.equal(found[-1:], there_and_back(weight[-1:], quantization)), "1024 rows are whole blocks"


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda quantization: quantization.name)
def test_the_largest_values_are_exact_and_a_block_of_zeros_stays_zero(quantization: Quantization) -> None:
    weight = normal(4, 256)
    weight[1] = 0
    found = there_and_back(weight, quantization)
    blocks, of_found = (x.float().view(-1, quantization.block) for x in (weight, found))
    largest = blocks.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(of_found.gather(1, largest), blocks.gather(1, largest))
    assert not found[1].any()


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda quantization: quantization.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_the_largest_values(bad: float, quantization: Quantization) -> None:
    """There the check of loaded weights finds it; codes have no NaN."""
    weight = normal(1, 256).flatten()
    weight[200] = bad
    _, absmax = quantize(weight, quantization)
    assert torch.isfinite(absmax).logical_not().nonzero().flatten().tolist() == [200 // quantization.block]


def test_nf4_has_the_codes_and_values_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    quantization = QUANTIZATIONS["nf4"]
    weight = normal(1024, 192)
    codes, absmax = quantize(weight.flatten(), quantization)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(theirs.flatten(), codes) and torch.equal(state.absmax, absmax.float())
    for dtype in (torch.float32, torch.bfloat16):
        assert quantized._bitsandbytes(torch.device("cpu")) is not None, "it would be used"
        by_kernel = dequantize(codes, absmax, quantization, (1024, 192), dtype)
        assert torch.equal(by_kernel.bfloat16(), functional.dequantize_4bit(theirs, state))
        with monkeypatch.context() as patched:
            patched.setattr(quantized, "_bitsandbytes", lambda device: None)
            assert torch.equal(dequantize(codes, absmax, quantization, (1024, 192), dtype), by_kernel)


def test_without_bitsandbytes_torch_computes_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._bitsandbytes.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "bagel_ds"):
            values = [there_and_back(normal(8, 64), QUANTIZATIONS["nf4"]) for _ in range(2)]
    finally:
        quantized._bitsandbytes.cache_clear()
    assert torch.equal(*values)
    assert [record.message.split(":")[0] for record in caplog.records] == ["nf4 weights are dequantized by torch"]


def layer_and_twin(quantization: Quantization, bias: bool = True) -> tuple[QuantizedLinear, Linear]:
    """A quantized layer and an ordinary one with its values, both with the same adapter."""
    layer = QuantizedLinear(96, 80, bias=bias, quantization=quantization)
    twin = Linear(96, 80, bias=bias)
    codes, absmax = quantize(normal(80, 96).flatten(), quantization)
    with torch.no_grad():
        layer.weight_codes.copy_(codes)
        layer.weight_absmax.copy_(absmax)
        twin.weight.copy_(layer.dequantized(codes, absmax, torch.float32))
        for one in (layer, twin):
            one.add_adapter(LoRA(4, 8.0))
            for name, parameter in one.named_parameters():
                if name in ("bias", "lora_A", "lora_B"):
                    parameter.copy_(normal(*parameter.shape))
    return layer, twin


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda quantization: quantization.name)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 5])
def test_a_layer_computes_and_learns_as_one_with_the_dequantized_weight(
    rows: int, bias: bool, quantization: Quantization
) -> None:
    results = []
    for layer in layer_and_twin(quantization, bias):
        x = normal(rows, 96).float().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if "lora" in name}
        results.append([y, x.grad, *gradients.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_codes_get_no_gradient_and_keep_their_bytes_in_every_dtype() -> None:
    layer, _ = layer_and_twin(QUANTIZATIONS["nf4"])
    before = layer.weight_codes.clone()
    layer.bfloat16()
    assert layer.weight_codes.dtype == torch.uint8 and torch.equal(layer.weight_codes, before)
    assert not layer.weight_codes.requires_grad and not layer.weight_absmax.requires_grad


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda quantization: quantization.name)
def test_one_weight_at_a_time_exists_forward_and_backward(quantization: Quantization, without_kernel: None) -> None:
    """Eight layers whose weights are far larger than everything else: the peak holds one of them."""
    width, rows = 1024, 4
    layers = nn.Sequential(*(QuantizedLinear(width, width, quantization=quantization) for _ in range(8))).bfloat16()
    with torch.no_grad():
        for layer in layers:
            codes, absmax = quantize(normal(width, width).flatten(), quantization)
            layer.weight_codes.copy_(codes)  # type: ignore[operator]
            layer.weight_absmax.copy_(absmax)  # type: ignore[operator]
            layer.bias.zero_()  # type: ignore[operator]
    one, activations = work_bytes(width**2, 2), 40 * rows * width * 2
    quantized._pairs(torch.device("cpu"))
    x = normal(rows, width).requires_grad_()
    live = LiveTensors()
    for parameter in layers.parameters():
        live.leave_out(parameter)
    with live:
        y = layers(x)
        assert live.now < activations, "nothing but activations is kept for the backward pass"
        assert 2 * width**2 < live.peak < one + activations
        live.peak = live.now
        y.sum().backward()
    assert 2 * width**2 < live.peak < one + activations
