"""This rank's share of split masters and their moments, as named flat ranges.

Guarantees: those of `zero/partitions.py`. What a caller sees are fp32 tensors, made group by group when it asks for
them; what it writes into them is kept when it closes the group. So a save in the background holds one group at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor

from bagel_ds.ranges import MASTER
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ, MOMENTS, AveragedGroups, Flats, Group, Partitions
from bagel_ds.zero.split.formats import moment_format, seed_of
from bagel_ds.zero.split.update import Average, SplitRange, Step, update

_VECTORS = {"-D__AVX512__": 16, "-D__AVX256__": 8}  # elements, as DeepSpeed builds its CPU Adam


class _States(NamedTuple):
    """Of one group. 1-D tensors of the group's size, padding included, and views of them for every placed range."""

    high: Tensor
    low: Tensor
    moments: tuple[Tensor, ...]
    ranges: tuple[SplitRange, ...]


class SplitPartitions(Partitions):
    """Of an engine whose optimizer is a `SplitZero3`."""

    def __init__(self, engine: Any, moments: str):
        super().__init__(engine)
        self._bias = _Bias()
        self._step = 0  # the number of steps that Adam has taken
        self._groups_updated = 0
        self._average: AveragedGroups | None = None
        options = self._adam().param_groups[0]
        self._format = moment_format(moments, options["betas"])
        self._states = [self._allocate(group) for group in self.groups]
        self._adam().update_group = self._update_group  # type: ignore[attr-defined]

    @contextmanager
    def open(self, group: Group, write: bool = False, moments: bool = False) -> Iterator[Flats]:
        flats = _Flats(self, self._states[group.index], group)
        yield flats
        if write:
            flats.keep()

    def set_step(self, step: int) -> None:
        self._step = step

    def average_with(self, average: AveragedGroups) -> None:
        self._average = average

    def updated(self) -> None:
        assert self._groups_updated == len(self.groups), "every group is updated once per step"
        self._groups_updated = 0
        self._step += 1

    @property
    def made_when_read(self) -> bool:
        return True

    def set_weights_aside(self, group: Group) -> Tensor:
        """In the memory of the gradients, which are not in use between two steps."""
        aside = self._optimizer.gradients(group.index).view(torch.bfloat16)[: self._states[group.index].high.numel()]
        return aside.copy_(self._states[group.index].high)

    def _prepare_states(self) -> None:
        pass  # they are allocated once, with the partitions

    def _lacks_moments(self, group: Group) -> bool:
        return False

    def _allocate(self, group: Group) -> _States:
        high = self._optimizer.fp16_partitioned_groups_flat[group.index]
        numel = high.numel()
        low = torch.zeros(numel, dtype=torch.int16, device=high.device)
        moments = self._format.allocate(numel, high.device)
        width = _VECTORS.get(CPUAdamBuilder().simd_width(), numel + 1)
        ranges = []
        for placed in group.ranges:
            part = slice(placed.offset, placed.offset + placed.range.numel)
            each = SplitRange(high[part], low[part], tuple(kept[part] for kept in moments), placed.range.start)
            each.fused = min(max(numel - numel % width - placed.offset, 0), placed.range.numel)
            ranges.append(each)
        return _States(high, low, moments, tuple(ranges))

    def _update_group(self, index: int, gradients: Tensor, factor: float) -> None:
        group, states, step = self.groups[index], self._states[index], self._step + 1
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
        )
        averaging = self._average.next(group) if self._average is not None else None
        for placed, kept in zip(group.ranges, states.ranges):
            average = None
            if averaging is not None:
                values = averaging.values.narrow(0, placed.offset, placed.range.numel)
                average = Average(values, averaging.weight, averaging.seed(placed.range.name))
            part = gradients.narrow(0, placed.offset, placed.range.numel)
            update(kept, self._format, part, numbers, seed_of(placed.range.name, step), average)
        self._groups_updated += 1


class _Flats(dict[str, Tensor]):
    """The fp32 tensors of a group, each made when it is first asked for."""

    def __init__(self, partitions: SplitPartitions, states: _States, group: Group):
        super().__init__()
        self._format, self._kept, self._group = partitions._format, states, group

    def __missing__(self, key: str) -> Tensor:
        if key == MASTER:
            self[MASTER] = torch.zeros(self._kept.high.shape, dtype=torch.float32, device=self._kept.high.device)
            for placed, each in zip(self._group.ranges, self._kept.ranges):
                self[MASTER][placed.offset : placed.offset + placed.range.numel] = each.master()
        elif key in MOMENTS:
            read = self._format.read(self._kept.moments)
            self[key] = read[MOMENTS.index(key)]
        else:
            raise KeyError(key)
        return self[key]

    def keep(self) -> None:
        if MASTER in self:
            for placed, each in zip(self._group.ranges, self._kept.ranges):
                each.put(self[MASTER][placed.offset : placed.offset + placed.range.numel])
        if EXP_AVG in self or EXP_AVG_SQ in self:
            self._format.write(self._kept.moments, self[EXP_AVG], self[EXP_AVG_SQ], None)


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
