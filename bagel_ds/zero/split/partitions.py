"""This rank's share of split masters and their moments, as named flat ranges.

Guarantees: those of `zero/partitions.py`. What a caller reads or writes is fp32, converted a piece at a time: neither a
save in the background nor a load holds more than a few MB beyond the states.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor

from bagel_ds.ranges import MASTER, Pieces, Range
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ, MOMENTS, AveragedGroups, Group, Partitions
from bagel_ds.zero.split.formats import MomentFormat, moment_format, seed_of, split
from bagel_ds.zero.split.swapped import SwappedGroups
from bagel_ds.zero.split.update import Average, SplitRange, Step, update

_VECTORS = {"-D__AVX512__": 16, "-D__AVX256__": 8}


@cache
def vector_elements() -> int:
    """How many elements DeepSpeed's CPU Adam computes at once on this processor."""
    return _VECTORS.get(CPUAdamBuilder().simd_width(), sys.maxsize)


class _States(NamedTuple):
    """Of one group: the weights (1-D, of the group's size, padding included) and each placed range's states.

    What lies beside the weights is in `held`: masters' lower halves and moments, or nothing if they are on NVMe.
    """

    high: Tensor
    ranges: tuple[SplitRange, ...]
    held: tuple[Tensor, ...]


class SplitPartitions(Partitions):
    """Of an engine whose optimizer is a `SplitZero2` or a `SplitZero3`."""

    def __init__(self, engine: Any, moments: str, folder: Path | None = None):
        """With `folder`, what lies beside the weights is in files there."""
        super().__init__(engine)
        self._bias = _Bias()
        self._step = 0  # the number of steps that Adam has taken
        self._groups_updated = 0
        self._average: AveragedGroups | None = None
        options = self._adam().param_groups[0]
        self._format = moment_format(moments, options["betas"])
        highs = [self._masters()[group.index].data for group in self.groups]
        self._swapped: SwappedGroups | None = None
        if folder is not None:
            dtypes = (torch.int16, *self._format.dtypes)
            self._swapped = SwappedGroups(folder, [len(high) for high in highs], dtypes)
        self._states = [self._states_of(group, high) for group, high in zip(self.groups, highs)]
        self._adam().update_group = self._update_group  # type: ignore[attr-defined]

    def pieces(self, key: str) -> Iterator[Pieces]:
        """As in every `Partitions`, but the values are views that convert what is read of them."""
        for group in self.groups:
            held: dict[str, list[Any]] = {name: [] for name in group.names}
            with self._opened(group) as states:
                for placed, kept in zip(group.ranges, states):
                    held[placed.range.name].append((placed.range, Fp32View(kept, self._format, key)))
                for name, ranges in held.items():
                    yield Pieces(name, ranges)

    def load(self, keys: Sequence[str], fill: Callable[[str, Range, Tensor], object]) -> None:
        for group in self.groups:
            with self._opened(group, write=True) as states:
                for placed, kept in zip(group.ranges, states):
                    self._load_range(keys, fill, placed.range, kept)

    def _load_range(
        self, keys: Sequence[str], fill: Callable[[str, Range, Tensor], object], whole: Range, kept: SplitRange
    ) -> None:
        ties = [kept.ties[:0]]
        for part, _ in kept.parts():
            numel = kept.high[part].numel()
            held = whole._replace(start=whole.start + part.start, numel=numel)
            made = {key: torch.empty(numel, device=kept.high.device) for key in keys}
            for key, target in made.items():
                fill(key, held, target)
            if MASTER in made:
                ties.append(part.start + split(made[MASTER], kept.high[part], kept.low[part]))
            if EXP_AVG in made:
                states_of = tuple(each[part] for each in kept.moments)
                self._format.write(states_of, made[EXP_AVG], made[EXP_AVG_SQ], None)
        if MASTER in keys:
            kept.ties = torch.cat(ties)

    def copy_of_masters(self, group: Group, allocate: Callable[[Tensor], Tensor]) -> Tensor:
        copy = allocate(self._states[group.index].high)
        with self._opened(group) as states:
            for placed, kept in zip(group.ranges, states):
                for part, _ in kept.parts():
                    values = kept.master(part)
                    copy.narrow(0, placed.offset + part.start, values.numel()).copy_(values)
        return copy

    @contextmanager
    def computing_with(self, values: Callable[[Group], Tensor]) -> Iterator[None]:
        """With ZeRO-3 the weights are half of the masters: they go aside to the memory of gradients, unused now."""
        if self._stage != 3:
            self.put_weights(lambda group: nullcontext(values(group)))
            yield
            self.put_weights(lambda group: nullcontext(self._states[group.index].high))
            return
        for group, states in zip(self.groups, self._states):
            self._aside(group).copy_(states.high)
        self.put_weights(lambda group: nullcontext(values(group)))
        yield  # without `finally`: a rank that fails must not wait for others in a collective call
        self.put_weights(lambda group: nullcontext(self._aside(group)))
        for group in self.groups:
            self._aside(group).zero_()

    def _aside(self, group: Group) -> Tensor:
        flat: Tensor = self._optimizer.gradients(group.index).view(torch.bfloat16)
        return flat[: self._states[group.index].high.numel()]

    def set_step(self, step: int) -> None:
        self._step = step

    def average_with(self, average: AveragedGroups) -> None:
        self._average = average

    def updated(self) -> None:
        assert self._groups_updated == len(self.groups), "every group is updated once per step"
        self._groups_updated = 0
        self._step += 1
        if self._swapped is not None:
            self._swapped.flush()

    def _prepare_states(self) -> None:
        pass  # they are allocated once, with the partitions

    def _states_of(self, group: Group, high: Tensor) -> _States:
        numel, width = high.numel(), vector_elements()
        ranges = []
        for placed in group.ranges:
            each = SplitRange(high.narrow(0, placed.offset, placed.range.numel), placed.range.start)
            each.fused = min(max(numel - numel % width - placed.offset, 0), placed.range.numel)
            ranges.append(each)
        if self._swapped is not None:
            return _States(high, tuple(ranges), ())
        low = torch.zeros(numel, dtype=torch.int16, device=high.device)
        return _States(high, tuple(ranges), (low, *self._format.allocate(numel, high.device)))

    @contextmanager
    def _opened(self, group: Group, write: bool = False, ahead: bool = False) -> Iterator[tuple[SplitRange, ...]]:
        """The states of the group's ranges. Those on NVMe are in memory only meanwhile; `write` keeps changes."""
        states = self._states[group.index]
        if self._swapped is None:
            opened: AbstractContextManager[tuple[Tensor, ...]] = nullcontext(states.held)
        else:
            opened = self._swapped.open(group.index, write, ahead)
        with opened as tensors:
            for placed, kept in zip(group.ranges, states.ranges):
                kept.hold(*(each.narrow(0, placed.offset, placed.range.numel) for each in tensors))
            yield states.ranges

    def _update_group(self, index: int, gradients: Tensor, factor: float) -> None:
        group, step = self.groups[index], self._step + 1
        options = self._adam().param_groups[0]
        (beta1, beta2), rate = options["betas"], np.float32(options["lr"])
        bias1, bias2 = self._bias.after(step, beta1, beta2)
        numbers = Step(
            factor=factor,
            beta1=beta1,
            beta2=beta2,
            bias2=bias2,
            eps=options["eps"],
            step_size=float(-rate / np.float32(bias1)),
            decay=float(-rate * np.float32(options["weight_decay"])),
            carried=float(-rate * beta1 / (1 - beta1)),
        )
        averaging = self._average.next(group) if self._average is not None else None
        with self._opened(group, write=True, ahead=True) as states:
            for placed, kept in zip(group.ranges, states):
                average = None
                if averaging is not None:
                    values = averaging.values.narrow(0, placed.offset, placed.range.numel)
                    average = Average(values, averaging.weight, averaging.seed(placed.range.name))
                part = gradients.narrow(0, placed.offset, placed.range.numel)
                update(kept, self._format, part, numbers, seed_of(placed.range.name, step), average)
        self._groups_updated += 1


class Fp32View:
    """A range of masters or moments that looks like a 1-D fp32 tensor to those who read parts of it."""

    dtype = torch.float32

    def __init__(self, kept: SplitRange, moments: MomentFormat, key: str):
        self._kept, self._format, self._key = kept, moments, key

    def __getitem__(self, part: slice) -> Tensor:
        if self._key == MASTER:
            return self._kept.master(part)
        return self._format.read(tuple(each[part] for each in self._kept.moments))[MOMENTS.index(self._key)]

    def split(self, numel: int) -> Iterator[Tensor]:
        for start in range(0, self.numel(), numel):
            yield self[start : start + numel]

    def numel(self) -> int:
        return self._kept.high.numel()

    def element_size(self) -> int:
        return 4

    def detach(self) -> Fp32View:
        return self


class _Bias:
    """Bias corrections as DeepSpeed's CPU Adam has them: powers of beta by repeated multiplication in fp32."""

    def __init__(self) -> None:
        self._known: tuple[int, float, float] = (0, 0.0, 0.0)
        self._powers = (np.float32(1), np.float32(1))

    def after(self, step: int, beta1: float, beta2: float) -> tuple[float, float]:
        """(1 - beta1^step, 1 / sqrt(1 - beta2^step))."""
        last, *betas = self._known
        if step < last or betas != [beta1, beta2]:
            last, self._powers = 0, (np.float32(1), np.float32(1))
        first, second = self._powers
        for _ in itertools.repeat(None, step - last):
            first, second = first * np.float32(beta1), second * np.float32(beta2)
        self._known, self._powers = (step, beta1, beta2), (first, second)
        one = np.float32(1)
        return float(one - first), float(one / np.sqrt(one - second))
