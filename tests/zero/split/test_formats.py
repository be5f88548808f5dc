"""Two halves are the fp32 master, moments survive their format, and rounding has no bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.zero.split.formats import (
    FloatMoments,
    PackedMoments,
    join,
    moment_format,
    random_bits,
    round_stochastically,
    seed_of,
    split,
)

BETAS = (0.9, 0.95)


def halves(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    return high, low, split(master, high, low)


def any_numbers(count: int) -> Tensor:
    """Every kind of finite fp32 number: random bits, a third of them halfway between two bf16 values."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    bits[::3] = (bits[::3] & -(2**16)) | 0x8000
    values = bits.view(torch.float32)
    return torch.where(values.isfinite(), values, torch.ones(()))


def test_two_halves_are_the_master_bit_for_bit_and_the_weight_is_rounded_to_nearest() -> None:
    extreme = torch.tensor([0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 1.00390625, 1.01171875])
    master = torch.cat([any_numbers(300_000), extreme])
    high, low, ties = halves(master)
    assert torch.equal(high, master.bfloat16())
    assert torch.equal(join(high, low, ties).view(torch.int32), master.view(torch.int32))
    assert 40_000 < len(ties) < 60_000, "half of the values halfway between two are rounded down"
    assert (low[ties] == -(2**15)).all() and (ties.diff() > 0).all()
    without = join(high, low, ties[:0])
    assert not torch.equal(without.view(torch.int32), master.view(torch.int32)), "the ties are needed"


def test_a_weight_in_bf16_has_nothing_in_the_other_half() -> None:
    high, low, ties = halves(any_numbers(1000).bfloat16().float())
    assert not low.any() and not len(ties)


def test_infinity_stays_and_nan_stays_one() -> None:
    master = torch.tensor([math.inf, -math.inf, math.nan])
    high, low, ties = halves(master)
    assert torch.equal(join(high, low, ties)[:2], master[:2]) and join(high, low, ties)[2].isnan()


def test_random_bits_are_those_of_an_elements_place_wherever_a_range_begins() -> None:
    seed = seed_of("weight", 3)
    whole = random_bits(seed, 0, 10_000, "cpu")
    assert torch.equal(random_bits(seed, 4_321, 99, "cpu"), whole[4_321:4_420])
    assert seed != seed_of("weight", 4) and seed != seed_of("bias", 3) and seed != seed_of("weight", 3, purpose=1)
    many = random_bits(seed, 0, 2**20, "cpu").double()
    for step in range(1, 4):  # neither in itself nor beside other steps
        other = random_bits(seed_of("weight", 3 + step), 0, 2**20, "cpu").double()
        assert abs(torch.corrcoef(torch.stack([many, other]))[0, 1]) < 0.005
        assert abs(torch.corrcoef(torch.stack([many[step:], many[:-step]]))[0, 1]) < 0.005
    for bit in range(32):
        assert abs(float((many.long() >> bit & 1).double().mean()) - 0.5) < 0.003


def test_stochastic_rounding_has_no_bias_and_keeps_what_bf16_holds() -> None:
    random = random_bits(7, 0, 200_000, "cpu") >> 16
    for value in (1.001, -0.30001, 7e-12):
        rounded = round_stochastically(torch.full((200_000,), value), random)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert float(rounded.double().mean()) == pytest.approx(value, rel=3e-5)
    held = torch.tensor([1.0, -2.5, 0.0]).repeat(1000)
    assert torch.equal(round_stochastically(held, random[:3000]), held)


# ---------------------------------------------------------------------------------------------------- Adam's moments
def moments(count: int = 100_000) -> tuple[Tensor, Tensor]:
    """As they become: over ten decades, with ratios that Adam can reach."""
    generator = torch.Generator().manual_seed(2)
    deviation = 10 ** (torch.rand(count, generator=generator) * 8 - 8)
    ratio = (torch.rand(count, generator=generator) * 2 - 1) * 1.1
    exp_avg, exp_avg_sq = ratio * deviation, deviation.square()
    exp_avg[::100] = exp_avg_sq[::100] = 0
    return exp_avg, exp_avg_sq


@pytest.mark.parametrize("kind", ["fp32", "bf16", "8bit"])
def test_what_a_format_holds_survives_a_training_state(kind: str) -> None:
    """Read in fp32, and written again by ranks that read other parts: nothing changes."""
    held = moment_format(kind, BETAS)
    exp_avg, exp_avg_sq = moments()
    kept = held.allocate(len(exp_avg), torch.device("cpu"))
    assert not any(each.any() for each in held.read(kept)), "moments begin at zero"
    held.write(kept, exp_avg, exp_avg_sq, random_bits(1, 0, len(exp_avg), "cpu"))
    again = held.allocate(len(exp_avg), torch.device("cpu"))
    for part in (slice(0, 12_345), slice(12_345, None)):
        read = held.read(tuple(each[part] for each in kept))
        held.write(tuple(each[part] for each in again), *read, None)
    assert all(torch.equal(one, other) for one, other in zip(kept, again))
    assert sum(each.element_size() for each in kept) == {"fp32": 8, "bf16": 4, "8bit": 2}[kind]


@pytest.mark.parametrize("kind, mean, square", [("fp32", 0, 0), ("bf16", 2**-7, 2**-7), ("8bit", 0.02, 0.065)])
def test_a_format_is_as_exact_as_it_says(kind: str, mean: float, square: float) -> None:
    """exp_avg relative to the deviation, which it is divided by; exp_avg_sq relative to itself."""
    held = moment_format(kind, BETAS)
    exp_avg, exp_avg_sq = moments()
    kept = held.allocate(len(exp_avg), torch.device("cpu"))
    held.write(kept, exp_avg, exp_avg_sq, random_bits(1, 0, len(exp_avg), "cpu"))
    found_avg, found_sq = held.read(kept)
    some = exp_avg_sq > 0
    assert not found_avg[~some].any() and not found_sq[~some].any()
    assert (
        (found_avg - exp_avg)[some].abs() <= mean * found_sq[some].sqrt() * 1.001 + mean * exp_avg[some].abs()
    ).all()
    assert ((found_sq / exp_avg_sq)[some] - 1).abs().max() <= square


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_moments_are_rounded_without_bias(kind: str) -> None:
    held, count = moment_format(kind, BETAS), 400_000
    kept = held.allocate(count, torch.device("cpu"))
    held.write(kept, torch.full((count,), -3.21e-6), torch.full((count,), 1.7e-10), random_bits(5, 0, count, "cpu"))
    found_avg, found_sq = held.read(kept)
    if kind == "bf16":  # the other rounds it to nearest, and masters take what is lost (test_update.py)
        assert float(found_avg.double().mean()) == pytest.approx(-3.21e-6, rel=1e-3)
    assert float(found_sq.double().mean()) == pytest.approx(1.7e-10, rel=1e-3)


def test_packed_moments_beyond_their_range_keep_updates_within_their_bound() -> None:
    held = PackedMoments(BETAS)
    exp_avg = torch.tensor([1e-20, 1e5, -1e5, 1e-9, 0.0])
    exp_avg_sq = torch.tensor([1e-40, 1e10, 1e10, 1e-30, 1e-12])
    kept = held.allocate(5, torch.device("cpu"))
    held.write(kept, exp_avg, exp_avg_sq, None)
    found_avg, found_sq = held.read(kept)
    assert found_sq[0] == found_sq[3] > 0, "raised to the least value, not dropped"
    assert found_avg[0] == 0 and found_avg[3].abs() < 1e-9 * 1.02, "below the range updates shrink"
    assert found_sq.isfinite().all() and ((found_avg / found_sq.sqrt()).abs() <= held.bound * 1.0001).all()


def test_the_ratio_of_moments_never_exceeds_its_bound() -> None:
    """The gradients that come closest: growing by beta2 / beta1 at every step."""
    beta1, beta2 = BETAS
    exp_avg = exp_avg_sq = 0.0
    for step in range(400):
        gradient = (beta2 / beta1) ** step
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    bound = PackedMoments(BETAS).bound
    assert 0.999 * bound < exp_avg / math.sqrt(exp_avg_sq) <= bound * (1 + 1e-9)


def test_betas_without_a_bound_are_refused() -> None:
    with pytest.raises(UserError, match=r"--beta1 0.9 --beta2 0.8: .* above beta1\^2 = 0.81.*16 or 32 bits"):
        moment_format("8bit", (0.9, 0.8))
    assert isinstance(moment_format("bf16", (0.9, 0.8)), FloatMoments)
