"""Exponential moving average of the weights, sharded beside the optimizer's masters.

Guarantees: after every optimizer step ema = decay * ema + (1 - decay) * master, for the ranges that this rank owns;
with `every` k, after every k-th step with decay^k. The average is where the masters are (on the GPU, in host memory or
in a mapped file on NVMe) and is never a second model. In fp32 it is exact to fp32 rounding. In bf16 each update is
rounded stochastically (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"): one update changes a value
by about a ten-thousandth, which rounding to nearest would always drop. The random bits are those of a parameter's name,
an element's place and the update's number, so that they are the same on any number of ranks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from bagel_ds.ranges import Pieces, WeightSource, copy_range
from bagel_ds.zero.partitions import Group, GroupAverage, Partitions, group_pieces
from bagel_ds.zero.split.formats import seed_of
from bagel_ds.zero.split.update import Average, update_average
from bagel_ds.zero.swap_io import reserve_file

_CHUNK = 2**22  # elements updated at once


class EMAOptions(NamedTuple):
    """With `folder` the values are in mapped files there, not in memory. `updates_done` counts those before a resumed
    run, so that `every` goes on from there."""

    decay: float
    every: int = 1
    dtype: torch.dtype = torch.float32
    folder: Path | None = None
    updates_done: int = 0


class ShardedEMA:
    """Registers itself with the partitions, so that every optimizer step updates it, group by group."""

    def __init__(self, partitions: Partitions, options: EMAOptions):
        self._partitions, self._options = partitions, options
        self._values: dict[int, Tensor] = {}
        self._updates: dict[int, int] = {group.index: options.updates_done for group in partitions.groups}
        for group in partitions.groups:
            if group.owned:
                self._values[group.index] = partitions.copy_of_masters(group, partial(self._allocate, group))
        partitions.average_with(self)

    def load(self, source: WeightSource) -> None:
        """Replace the values, at first those of the masters, by those of a model file or a training state."""
        for piece in self.pieces():
            for held, values in piece.ranges:
                copy_range(values, held, source.read)

    def values(self, group: Group) -> Tensor:
        """The average of an owned group, laid out like its master."""
        return self._values[group.index]

    def pieces(self) -> Iterator[Pieces]:
        """This rank's share, name by name, in the same order on all ranks."""
        for group in self._partitions.groups:
            yield from group_pieces(group, self._values.get(group.index, torch.empty(0)))

    def next(self, group: Group) -> GroupAverage | None:
        self._updates[group.index] += 1
        updates, every = self._updates[group.index], self._options.every
        if not group.owned or updates % every:
            return None
        return GroupAverage(
            self._values[group.index], 1 - self._options.decay**every, lambda name: seed_of(name, updates, purpose=1)
        )

    @torch.no_grad()
    def update(self, group: Group, master: Tensor) -> None:
        due = self.next(group)
        if due is None:
            return
        for placed in group.ranges:
            start, seed = placed.range.start, due.seed(placed.range.name)
            # In chunks, because masters may be bf16, and an fp32 copy of a whole group takes 4 bytes per element.
            values, masters = (flat.narrow(0, placed.offset, placed.range.numel) for flat in (due.values, master))
            for chunk, target in zip(values.split(_CHUNK), masters.split(_CHUNK)):
                update_average(Average(chunk, due.weight, seed), target.float(), start)
                start += chunk.numel()

    def _allocate(self, group: Group, like: Tensor) -> Tensor:
        if self._options.folder is None:
            return torch.zeros_like(like, dtype=self._options.dtype)
        self._options.folder.mkdir(parents=True, exist_ok=True)
        path = self._options.folder / f"group_{group.index}.ema"
        reserve_file(path, like.numel() * self._options.dtype.itemsize, "the EMA")
        return torch.from_file(str(path), shared=True, size=like.numel(), dtype=self._options.dtype)
