"""The number formats of split masters and of Adam's moments, as operations on torch tensors.

Guarantees: `join` gives back the fp32 values that `split` got, bit for bit (of NaN, that it is one). Values that a
moment format can hold survive `write` and `read` unchanged, so that a training state can be saved in fp32 and read back
by any number of ranks. Random bits depend only on a seed and on an element's place in its whole tensor.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bagel_ds.errors import UserError

_MASK = 0xFFFFFFFF
_TIE = 0x8000


def split(master: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Write fp32 masters (1-D) into `high` (bf16, rounded to nearest even) and `low` (int16); returns the ties.

    low is what the master's bits exceed those of `high` by, in units of the last of 32 bits. That is -32768 to 32768,
    one value too many: 32768 and -32768 are the same 16 bits. Both occur only where a master lies exactly between two
    bf16 values. The ties (int64 positions, ascending) are those of the first kind, one in 131,072 at random.
    """
    high.copy_(master)
    rest = master.view(torch.int32) - (high.view(torch.int16).to(torch.int32) << 16)
    rest.masked_fill_(master.isnan(), 0)
    low.copy_(rest)  # 32768 wraps to -32768
    return (rest == _TIE).nonzero().view(-1)


def join(high: Tensor, low: Tensor, ties: Tensor) -> Tensor:
    """The fp32 masters."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low
    bits[ties] += 2 * _TIE
    return bits.view(torch.float32)


# ----------------------------------------------------------------------------------------------------- random numbers
def seed_of(name: str, step: int, purpose: int = 0) -> int:
    """32 bits for `random_bits`, of a tensor's name and a step."""
    return _mix(zlib.crc32(name.encode()) ^ _mix(2 * step + purpose & _MASK))


def random_bits(seed: int, start: int, numel: int, device: torch.device | str) -> Tensor:
    """32 random bits for each of the elements from `start` of a flat tensor, as int64 (numel)."""
    index = torch.arange(start, start + numel, dtype=torch.int64, device=device)
    mixed = ((index * 0x9E3779B1) & _MASK) ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed ^= mixed >> shift
        mixed = (mixed * factor) & _MASK
    return mixed ^ (mixed >> 16)


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """fp32 values rounded up or down to neighboring bf16 values, still as fp32; probabilities preserve the mean.

    `random` has 16 bits for each.
    """
    return ((values.view(torch.int32) + random.to(torch.int32)) & -(2**16)).view(torch.float32)


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK
    return x ^ x >> 16


# ---------------------------------------------------------------------------------------------------- Adam's moments
class MomentFormat(ABC):
    """How the two moments are kept: `exp_avg` (the mean of gradients) and `exp_avg_sq` (of their squares)."""

    kind: int  # in update.cpp
    dtypes: tuple[torch.dtype, ...]  # of the tensors, each with one element per parameter

    def allocate(self, numel: int, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(numel, dtype=dtype, device=device) for dtype in self.dtypes)

    @abstractmethod
    def read(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Both moments in fp32."""

    @abstractmethod
    def write(
        self, kept: tuple[Tensor, ...], exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None
    ) -> Tensor | None:
        """Keep fp32 moments, rounded with 32 random bits each, or to nearest without.

        Returns what the kept exp_avg lacks, relative to the root of the kept exp_avg_sq, if its rounding has a bias.
        """


class FloatMoments(MomentFormat):
    """In fp32, or in bf16 with stochastic rounding."""

    def __init__(self, dtype: torch.dtype):
        self.kind = 0 if dtype == torch.float32 else 1
        self.dtypes = (dtype, dtype)

    def read(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return kept[0].float(), kept[1].float()

    def write(
        self, kept: tuple[Tensor, ...], exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None
    ) -> Tensor | None:
        if random is not None and self.kind:
            exp_avg = round_stochastically(exp_avg, random >> 16)
            exp_avg_sq = round_stochastically(exp_avg_sq, random & 0xFFFF)
        kept[0].copy_(exp_avg)
        kept[1].copy_(exp_avg_sq)
        return None


class PackedMoments(MomentFormat):
    """Both in 16 bits, element by element, without blocks.

    Ten bits are sqrt(exp_avg_sq) as a floating-point number with 5 bits of exponent and 5 of mantissa, from 2^-29 to
    2^3 (0 for zero; smaller values are raised to the least, so that no update grows), rounded stochastically such that
    exp_avg_sq has no bias. Six bits are the ratio exp_avg / sqrt(exp_avg_sq) in equal steps, to nearest. It is what an
    update is made of, and by the inequality of Cauchy and Schwarz it never exceeds `bound`, whatever the gradients
    were. What rounding takes from the ratio would have moved the master by beta1 + beta1^2 + ... = beta1 / (1 - beta1)
    times as much in later steps; the master, which loses nothing, moves by that at once. So the errors of many steps
    don't add up.
    """

    kind = 2
    dtypes = (torch.int16,)
    _RATIOS = 31.0  # steps on each side of zero
    _LEAST = 98 << 5  # the upper 14 bits of 2^-29 in fp32
    _LAST = 1023

    def __init__(self, betas: tuple[float, float]):
        beta1, beta2 = betas
        if beta2 <= beta1**2:
            raise UserError(
                f"--beta1 {beta1:g} --beta2 {beta2:g}: moments of 8 bits need a beta2 above beta1^2 = {beta1**2:g}, or "
                "updates have no bound; choose other values, or a preset whose moments have 16 or 32 bits"
            )
        self.bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        self.unit = self.bound / self._RATIOS  # of the ratio

    def read(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        codes = kept[0].to(torch.int32) & 0xFFFF
        deviation = self._deviation(codes >> 6).masked_fill_(codes < 64, 0.0)  # also memory that was never written
        return ((codes & 63) - 32).float() * self.unit * deviation, deviation.square()

    def write(
        self, kept: tuple[Tensor, ...], exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None
    ) -> Tensor | None:
        bits = exp_avg_sq.sqrt().view(torch.int32)
        if random is None:
            code = ((bits + (1 << 17)) >> 18) - self._LEAST
        else:
            code = (bits >> 18) - self._LEAST
            under, over = self._deviation(code).square(), self._deviation(code + 1).square()
            code += (random & 0xFFFF).float() / 65536 * (over - under) < exp_avg_sq - under
        code.clamp_(1, self._LAST)
        ratio = exp_avg / self._deviation(code) / self.unit
        nearest = (ratio + 0.5).floor_()
        step = nearest.clamp(-self._RATIOS, self._RATIOS)
        is_zero = exp_avg_sq <= 0
        kept[0].copy_(((code << 6) | (step.to(torch.int32) + 32)).masked_fill_(is_zero, 32))  # the upper half wraps
        return (ratio - step).masked_fill_((step != nearest) | is_zero, 0.0) * self.unit

    def _deviation(self, code: Tensor) -> Tensor:
        return ((code + self._LEAST) << 18).view(torch.float32)


def moment_format(moments: str, betas: tuple[float, float]) -> MomentFormat:
    """Of "fp32", "bf16" or "8bit". Raises `UserError`."""
    if moments == "8bit":
        return PackedMoments(betas)
    return FloatMoments({"fp32": torch.float32, "bf16": torch.bfloat16}[moments])
