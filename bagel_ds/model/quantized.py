"""Linear layers whose weight is kept in 4 or 8 bits (`shape/quantization.py`).

Guarantees: a weight exists in the activations' dtype only while its layer multiplies, in the forward and again in the
backward pass; what is saved for backward are the codes. Values are code * largest absolute value of the block, taken in
fp32 and rounded once, so they are those of bitsandbytes (nf4) whichever kernel computes them.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import Any, Callable

import torch
from torch import Tensor, nn

from bagel_ds.model.layers import Linear
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.quantization import PIECE, Quantization

logger = logging.getLogger("bagel_ds")

# Quantiles of a normal distribution, scaled to [-1, 1] and with an exact zero (QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_ZERO = NF4.index(0.0)


def quantize(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and largest absolute values (bf16) of a flat weight that begins with a block."""
    return codes_of(weight, quantization), largest_values(weight, quantization)


def largest_values(weight: Tensor, quantization: Quantization) -> Tensor:
    """The largest absolute value of each block in bf16, which is exact for a weight in bf16.

    A block that holds a NaN or an infinity gets it as its largest value.
    """
    return _largest(_blocks(weight, quantization))


def codes_of(weight: Tensor, quantization: Quantization) -> Tensor:
    """The levels nearest to a flat weight that begins with a block, relative to the blocks' largest values; uint8."""
    blocks = _blocks(weight, quantization)
    scaled = blocks / _largest(blocks).float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    if quantization.name == "int8":
        codes = scaled.mul_(127).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8).view(-1)
        return codes[: weight.numel()].clone()
    levels = torch.tensor(NF4, dtype=torch.float64, device=weight.device)
    nearest = torch.bucketize(scaled.view(-1), ((levels[1:] + levels[:-1]) / 2).float(), out_int32=True)
    nearest[weight.numel() :] = _ZERO  # of a last byte's second half
    high, low = nearest.to(torch.uint8).view(-1, 2).unbind(1)
    return (high << 4 | low)[: quantization.codes(weight.numel())]


def _largest(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(dim=1).bfloat16()


def _blocks(weight: Tensor, quantization: Quantization) -> Tensor:
    """[blocks, block] fp32, the last filled up with zeros."""
    missing = -weight.numel() % quantization.block
    return nn.functional.pad(weight.float(), (0, missing)).view(-1, quantization.block)


def dequantize(
    codes: Tensor, absmax: Tensor, quantization: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight of this shape from its codes (uint8) and largest absolute values (any float dtype)."""
    kernel = _bitsandbytes(codes.device) if quantization.name == "nf4" else None
    if kernel is not None:
        return kernel(codes, absmax.float(), quantization.block, quantization.name, shape, dtype)
    numel = shape[0] * shape[1]
    weight = torch.empty(numel, dtype=dtype, device=codes.device)
    for start in range(0, numel, PIECE):
        piece = weight[start : start + PIECE]
        stop = start + len(piece)
        part = codes[start // quantization.per_byte : quantization.codes(stop)]
        values = _values(part, quantization)[: len(piece)]
        scales = absmax[start // quantization.block : quantization.blocks(stop)].float()
        whole = len(piece) // quantization.block * quantization.block
        values[:whole].view(-1, quantization.block).mul_(scales[: whole // quantization.block, None])
        values[whole:].mul_(scales[-1])
        piece.copy_(values)
    return weight.view(shape)


def _values(codes: Tensor, quantization: Quantization) -> Tensor:
    """fp32, relative to the blocks' largest values."""
    if quantization.name == "int8":
        return codes.view(torch.int8).float().div_(127)
    return nn.functional.embedding(codes.int(), _pairs(codes.device)).view(-1)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] fp32: the two values of every byte, the first in its high half."""
    levels = torch.tensor(NF4, dtype=torch.float32)
    return torch.cartesian_prod(levels, levels).to(device)


@lru_cache(maxsize=8)
def _bitsandbytes(device: torch.device) -> Any:
    """Its kernel for `device`, if it is installed and computes what ours does; else None, which is said once."""
    try:
        import bitsandbytes  # noqa: F401  registers the kernels of the device

        kernel = torch.ops.bitsandbytes.dequantize_4bit.default
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        absmax = torch.arange(1.0, 9.0, device=device)
        found = kernel(codes, absmax, 64, "nf4", [8, 64], torch.float32)
    except Exception as error:  # whatever a package that isn't ours raises, weights must come out right
        logger.info("nf4 weights are dequantized by torch: bitsandbytes can't be used (%s)", _first_line(error))
        return None
    expected = _pairs(device)[codes.int()].view(8, 64) * absmax[:, None]
    if not torch.equal(found, expected):
        logger.warning("nf4 weights are dequantized by torch: bitsandbytes %s differs", bitsandbytes.__version__)
        return None
    return kernel


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def linear_layer(config: BagelConfig) -> Callable[..., Linear]:
    """Makes the language model's linear layers: `Linear`, or quantized ones."""
    quantization = config.quantization
    return Linear if quantization is None else partial(QuantizedLinear, quantization=quantization)


class QuantizedLinear(Linear):
    """A linear layer with `weight_codes` and `weight_absmax` in the place of `weight`. Neither trains, nor its bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, quantization: Quantization):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the weight
        self.in_features, self.out_features, self.quantization = in_features, out_features, quantization
        numel = in_features * out_features
        codes = torch.empty(quantization.codes(numel), dtype=torch.uint8)
        self.weight_codes = nn.Parameter(codes, requires_grad=False)
        self.weight_absmax = nn.Parameter(torch.empty(quantization.blocks(numel)), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def base(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight_codes, self.weight_absmax, self.bias, self)
        return y

    def dequantized(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, [outputs, inputs]."""
        return dequantize(codes, absmax, self.quantization, (self.out_features, self.in_features), dtype)


class _Product(torch.autograd.Function):
    """x W^T of a quantized layer, whose weight gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, layer: QuantizedLinear
    ) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        ctx.layer = layer
        weight = layer.dequantized(codes, absmax, x.dtype).T
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        codes, absmax = ctx.saved_tensors
        return gradient @ ctx.layer.dequantized(codes, absmax, gradient.dtype), None, None, None, None
