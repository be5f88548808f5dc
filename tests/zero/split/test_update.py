"""A step over split masters is one of AdamW: DeepSpeed's, bit for bit, where it runs on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bagel_ds.zero.split import update as update_module
from bagel_ds.zero.split.formats import MomentFormat, moment_format, seed_of
from bagel_ds.zero.split.kernel import kernel
from bagel_ds.zero.split.partitions import vector_elements
from bagel_ds.zero.split.update import Average, SplitRange, Step, update, update_average, update_by_torch

BETAS, EPS, LR = (0.9, 0.95), 1e-15, 2e-5
COUNT = 3 * 1024 + 5  # blocks of the kernel, and less than a vector
Update = Callable[[SplitRange, MomentFormat, Tensor, Step, int, Average | None], None]


def masters() -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(0)) * 0.02


def fresh(moments: MomentFormat, start: int = 0, values: Tensor | None = None) -> SplitRange:
    values = masters() if values is None else values
    count = len(values)
    kept = SplitRange(torch.empty(count, dtype=torch.bfloat16), start)
    kept.hold(torch.empty(count, dtype=torch.int16), *moments.allocate(count, torch.device("cpu")))
    kept.put(values)
    return kept


def gradients(step: int, dtype: torch.dtype = torch.bfloat16, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(count, generator=generator) * 1e-3).to(dtype)


def numbers(step: int, factor: float = 0.37, decay: float = 0.0) -> Step:
    """As DeepSpeed's CPU Adam has them: in single precision, powers by repeated multiplication."""
    one, first, second = np.float32(1), np.float32(1), np.float32(1)
    for _ in range(step):
        first, second = first * np.float32(BETAS[0]), second * np.float32(BETAS[1])
    bias2 = float(one / np.sqrt(one - second))
    step_size = float(-np.float32(LR) / (one - first))
    return Step(factor, *BETAS, bias2, EPS, step_size, float(-np.float32(LR) * decay), -LR * BETAS[0] / (1 - BETAS[0]))


def train(
    by: Update, kept: SplitRange, moments: MomentFormat, steps: int, average: Tensor | None = None, weight: float = 1e-3
) -> None:
    for step in range(1, steps + 1):
        averaged = None if average is None else Average(average, weight, seed_of("w", step, 1))
        part = gradients(step)[kept.start : kept.start + kept.high.numel()]
        by(kept, moments, part, numbers(step), seed_of("w", step), averaged)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_fp32_moments_it_is_deepspeeds_cpu_adam_bit_for_bit(dtype: torch.dtype, decay: float) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(masters())
    theirs = DeepSpeedCPUAdam([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    moments = moment_format("fp32", BETAS)
    ours = fresh(moments)
    ours.fused = COUNT - COUNT % vector_elements()
    assert ours.fused < COUNT
    for step in range(1, 21):
        gradient = gradients(step, dtype)
        parameter.grad = gradient.float() * torch.tensor(0.37)
        theirs.step()
        update(ours, moments, gradient, numbers(step, decay=decay), 0)
    state = theirs.state[parameter]
    assert torch.equal(ours.master(), parameter.data)
    assert torch.equal(ours.moments[0], state["exp_avg"]) and torch.equal(ours.moments[1], state["exp_avg_sq"])
    assert torch.equal(ours.high, parameter.data.bfloat16())


def test_masters_that_lie_halfway_are_updated_as_what_they_are() -> None:
    """Without their list, a master above its weight by half a step would count as one below it."""
    bits = (masters().view(torch.int32) & -(2**16)) | 0x8000
    values, moments = bits.view(torch.float32), moment_format("fp32", BETAS)
    still = numbers(1)._replace(step_size=0.0, carried=0.0)
    for by in (update, update_by_torch):
        kept = fresh(moments, values=values)
        assert 1000 < len(kept.ties) < 2000
        before = kept.ties.clone()
        by(kept, moments, gradients(1), still, 0, None)
        assert torch.equal(kept.master(), values) and torch.equal(kept.ties, before)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "8bit"])
def test_torch_does_what_the_kernel_does(kind: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last bit, as torch fuses no operations. It works in chunks, which begin anywhere."""
    monkeypatch.setattr(update_module, "_CHUNK", 1000)
    moments = moment_format(kind, BETAS)
    found = []
    for by in (update, update_by_torch):
        kept = fresh(moments)
        average = None if dtype is None else masters().to(dtype)
        train(by, kept, moments, 5, average)
        found.append((kept, average))
    (one, one_average), (other, other_average) = found
    moved = (one.master() - masters()).abs()
    assert float(moved.mean()) > LR
    apart = (one.master() - other.master()).abs()
    assert float((apart <= 1e-3 * LR).float().mean()) > 0.998 and float(apart.max()) < 0.2 * LR
    for mine, others in zip(one.moments, other.moments):
        assert float((mine.float() - others.float()).abs().mean()) <= 1e-3 * float(mine.float().abs().mean())
    if one_average is not None and other_average is not None:
        assert float((one_average == other_average).float().mean()) > 0.99
        assert not torch.equal(one_average, masters().to(one_average.dtype))


@pytest.mark.parametrize("weight", [1e-4, 0.3, 0.5, 0.9])
def test_the_kernel_averages_as_torch_does_bit_for_bit(weight: float) -> None:
    """In fp32 with torch's lerp, in bf16 with the same random bits."""
    moments = moment_format("fp32", BETAS)
    for dtype in (torch.float32, torch.bfloat16):
        kept, average = fresh(moments, start=17), torch.zeros(COUNT, dtype=dtype)
        expected = average.clone()
        for step in range(1, 4):
            update(kept, moments, gradients(step), numbers(step), 0, Average(average, weight, 1000 + step))
            update_average(Average(expected, weight, 1000 + step), kept.master(), 17)
        assert torch.equal(average, expected)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("by", [update, update_by_torch])
def test_any_cut_into_ranges_gives_the_same_states(kind: str, by: Update) -> None:
    """Random bits belong to an element of a tensor, and moments have no blocks."""
    moments = moment_format(kind, BETAS)
    whole, average = fresh(moments), masters().bfloat16()
    train(by, whole, moments, 6, average)
    for cuts in ([0, 1, 7, 1000, COUNT], [0, 1024, 2048, COUNT]):
        for low, high in zip(cuts, cuts[1:]):
            part, values = fresh(moments, low, masters()[low:high]), masters()[low:high].bfloat16()
            train(by, part, moments, 6, values)
            assert torch.equal(part.master(), whole.master(slice(low, high)))
            assert all(torch.equal(one, other[low:high]) for one, other in zip(part.moments, whole.moments))
            assert torch.equal(values, average[low:high])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    moments, before = moment_format("8bit", BETAS), torch.get_num_threads()
    values = torch.where(
        torch.arange(COUNT) % 2 == 0, masters(), ((masters().view(torch.int32) & -(2**16)) | 0x8000).view(torch.float32)
    )
    expected = fresh(moments, values=values)
    train(update, expected, moments, 3)
    torch.set_num_threads(threads)
    try:
        found = fresh(moments, values=values)
        train(update, found, moments, 3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.master(), expected.master()) and torch.equal(found.ties, expected.ties)


@pytest.mark.parametrize("kind, least, off", [("fp32", 1.0, 1e-6), ("bf16", 0.999, 0.01), ("8bit", 0.998, 0.04)])
def test_what_a_format_keeps_of_the_updates(kind: str, least: float, off: float) -> None:
    """200 steps with gradients of which most is noise, beside Adam in double precision."""
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(COUNT, generator=generator) * 3e-4
    start, moments = masters(), moment_format(kind, BETAS)
    kept = fresh(moments)
    exact, mean, square = start.double(), torch.zeros(COUNT).double(), torch.zeros(COUNT).double()
    for step in range(1, 201):
        gradient = (drift + torch.randn(COUNT, generator=generator) * 1e-3).bfloat16()
        update(kept, moments, gradient, numbers(step, factor=1.0), seed_of("w", step))
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient.double()
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient.double().square()
        exact -= LR * (mean / (1 - BETAS[0] ** step)) / (square / (1 - BETAS[1] ** step)).sqrt()
    moved, true = kept.master().double() - start.double(), exact - start.double()
    assert least - 1e-4 <= float(moved @ true / (true @ true)) <= 1.02
    assert float((moved - true).norm() / true.norm()) <= off + 1e-4


def test_without_a_compiler_torch_updates_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(logging.getLogger("bagel_ds"), "propagate", True)
    moments = moment_format("bf16", BETAS)
    expected = fresh(moments)
    train(update_by_torch, expected, moments, 2)
    kernel.cache_clear()
    try:
        found = fresh(moments)
        train(update, found, moments, 2)
    finally:
        kernel.cache_clear()
    assert torch.equal(found.master(), expected.master())
    said = [record.getMessage() for record in caplog.records if record.name == "bagel_ds"]
    assert len(said) == 1 and "can't be built" in said[0] and "torch updates them" in said[0]


def test_the_kernel_is_built_here() -> None:
    """The other tests would pass without it."""
    assert kernel() is not None
