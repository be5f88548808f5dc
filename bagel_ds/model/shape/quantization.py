"""Formats in which a network keeps weights that don't train: codes of 4 or 8 bits, and a scale for each block of them.

A weight is cut into blocks of consecutive elements in row-major order. Each element is a code relative to its block's
largest absolute value. `model/quantized.py` makes codes and weights of one another.
"""

from __future__ import annotations

from typing import NamedTuple

PIECE = 2**22  # elements that are dequantized at a time without a kernel for it; a multiple of every block
CODES, ABSMAX = "weight_codes", "weight_absmax"


class Quantization(NamedTuple):
    """`block` elements share a largest absolute value; a byte holds `per_byte` codes."""

    name: str
    block: int
    per_byte: int

    def codes(self, numel: int) -> int:
        """Bytes of the codes of so many elements."""
        return -(-numel // self.per_byte)

    def blocks(self, numel: int) -> int:
        return -(-numel // self.block)


QUANTIZATIONS = {
    "nf4": Quantization("nf4", block=64, per_byte=2),  # NormalFloat, Dettmers et al. 2023 (QLoRA), without nesting
    "int8": Quantization("int8", block=128, per_byte=1),
}


def work_bytes(numel: int, dtype_bytes: int) -> int:
    """Memory to multiply with a quantized weight: the weight and, without a kernel, a piece of it in fp32 and as
    indexes, and the largest values in fp32."""
    return numel * dtype_bytes + 8 * min(numel, PIECE) + numel // 16


def is_codes(parameter: str) -> bool:
    """Whether a parameter holds codes: uint8, one byte per element in every precision of the run."""
    return parameter.rpartition(".")[2] == CODES


def base_of(parameter: str) -> tuple[str, str] | None:
    """(name of the weight, CODES or ABSMAX) of a parameter that a quantized layer has in its place; None for others."""
    layer, _, kind = parameter.rpartition(".")
    return (f"{layer}.weight", kind) if kind in (CODES, ABSMAX) else None
