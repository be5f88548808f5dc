"""The sharded average: exact in fp32, unbiased in bf16, compounded when it is updated less often."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.ranges import Range, TensorInfo
from bagel_ds.zero.ema import EMAOptions, ShardedEMA
from bagel_ds.zero.partitions import AveragedGroups, Group, PlacedRange

RANGES = (PlacedRange(Range("a", 3, 5), 0), PlacedRange(Range("b", 0, 2), 5))


class OneGroup:
    """What `ShardedEMA` asks of partitions; by default 5 elements of "a" from 3 on, then all 2 of "b"."""

    def __init__(self, master: Tensor, owned: bool = True, ranges: tuple[PlacedRange, ...] = RANGES):
        self.groups = (Group(0, ("a", "b", "elsewhere"), ranges, owned),)
        self.master = master
        self.average: AveragedGroups | None = None

    def copy_of_masters(self, group: Group, allocate: Callable[[Tensor], Tensor]) -> Tensor:
        return allocate(self.master).copy_(self.master)

    def average_with(self, average: AveragedGroups) -> None:
        self.average = average

    def step(self, master: Tensor) -> None:
        self.master = master
        assert self.average is not None
        self.average.update(self.groups[0], master)


def masters(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, generator=generator) for _ in range(count)]


def values(ema: ShardedEMA) -> Tensor:
    return torch.cat([tensor for piece in ema.pieces() for _, tensor in piece.ranges]).double()


def run(options: EMAOptions, count: int) -> tuple[Tensor, Tensor]:
    """The average after `count` steps and its float64 reference."""
    start, *steps = masters(count + 1)
    partitions: Any = OneGroup(start)
    ema = ShardedEMA(partitions, options)
    reference = start.double()
    for number, master in enumerate(steps, start=1):
        partitions.step(master)
        if number % options.every == 0:
            decay = options.decay**options.every
            reference = decay * reference + (1 - decay) * master.double()
    return values(ema), reference


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_it_equals_a_float64_reference_within_fp32_rounding(decay: float, every: int) -> None:
    found, reference = run(EMAOptions(decay, every), 200)
    torch.testing.assert_close(found, reference, rtol=2e-6, atol=2e-6)


def test_equal_weights_leave_it_as_it_is() -> None:
    master = masters(1)[0]
    partitions: Any = OneGroup(master)
    ema = ShardedEMA(partitions, EMAOptions(0.9999))
    for _ in range(50):
        partitions.step(master)
    assert torch.equal(values(ema), master.double())


def test_in_bf16_it_follows_where_rounding_to_nearest_stands_still() -> None:
    """From 1 towards 2 by parts of 1e-4: the steps are a hundredth of bf16's spacing."""
    start = torch.ones(100_000)
    partitions: Any = OneGroup(start, ranges=(PlacedRange(Range("a", 0, 100_000), 0),))
    ema = ShardedEMA(partitions, EMAOptions(0.9999, dtype=torch.bfloat16))
    for _ in range(200):
        partitions.step(start * 2)
    (flat,) = ema._values.values()
    assert flat.dtype == torch.bfloat16
    exact = 2 - 0.9999**200
    assert float(flat.float().mean()) == pytest.approx(exact, abs=2e-4)
    # An update of size d between neighbours s apart has variance at most d s; here sum(d) is what was travelled.
    assert float(flat.float().std()) < 1.1 * ((exact - 1) * 2**-7) ** 0.5


def test_in_bf16_it_is_the_same_however_ranks_share_it() -> None:
    start, *steps = [each.repeat(30) for each in masters(6)]
    whole: Any = OneGroup(start, ranges=(PlacedRange(Range("a", 0, 210), 0),))
    parts: list[Any] = [
        OneGroup(start[low:high], ranges=(PlacedRange(Range("a", low, high - low), 0),))
        for low, high in ((0, 71), (71, 210))
    ]
    options = EMAOptions(0.99, dtype=torch.bfloat16)
    averages = [ShardedEMA(each, options) for each in (whole, *parts)]
    for master in steps:
        whole.step(master)
        parts[0].step(master[:71])
        parts[1].step(master[71:])
    one, first, second = (values(each) for each in averages)
    assert torch.equal(one, torch.cat([first, second])) and not torch.equal(one, start.bfloat16().double())


def test_pieces_are_named_and_what_is_elsewhere_is_empty() -> None:
    partitions: Any = OneGroup(masters(1)[0])
    found = {
        piece.name: [held for held, _ in piece.ranges] for piece in ShardedEMA(partitions, EMAOptions(0.9)).pieces()
    }
    assert found == {"a": [Range("a", 3, 5)], "b": [Range("b", 0, 2)], "elsewhere": []}
    other: Any = OneGroup(masters(1)[0], owned=False)
    assert all(not piece.ranges for piece in ShardedEMA(other, EMAOptions(0.9)).pieces())


def test_it_can_lie_in_mapped_files(tmp_path: Path) -> None:
    on_disk, reference = run(EMAOptions(0.9, folder=tmp_path), 20)
    torch.testing.assert_close(on_disk, reference, rtol=2e-6, atol=2e-6)
    assert (tmp_path / "group_0.ema").stat().st_size == 7 * 4


def test_a_resumed_run_keeps_the_rhythm() -> None:
    start, *steps = masters(8)
    whole: Any = OneGroup(start)
    ema = ShardedEMA(whole, EMAOptions(0.9, every=3))
    for master in steps[:4]:
        whole.step(master)
    kept = values(ema)

    class Kept:
        def __contains__(self, name: str) -> bool:
            return True

        def info(self, name: str) -> TensorInfo:
            return TensorInfo(torch.float32, (8,) if name == "a" else (2,))

        def read(self, name: str, first: int = 0, numel: int | None = None) -> Tensor:
            return (kept[:5] if name == "a" else kept[5:]).float()

    again: Any = OneGroup(steps[3])
    resumed = ShardedEMA(again, EMAOptions(0.9, every=3, updates_done=4))
    resumed.load(Kept())
    for master in steps[4:]:
        whole.step(master)
        again.step(master)
    assert torch.equal(values(resumed), values(ema))


def test_space_on_nvme_is_reserved_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, count: reserved.append((start, count)))
    partitions: Any = OneGroup(masters(1)[0])
    ShardedEMA(partitions, EMAOptions(0.9, dtype=torch.bfloat16, folder=tmp_path))
    assert reserved == [(0, 7 * 2)]


def test_a_full_nvme_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    partitions: Any = OneGroup(masters(1)[0])
    with pytest.raises(UserError, match="--nvme_path: .*EMA .No space left on device"):
        ShardedEMA(partitions, EMAOptions(0.9, folder=tmp_path))
