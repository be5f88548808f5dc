"""Exponential moving average of the weights, sharded beside the optimizer's masters.

Guarantees: ema = decay * ema + (1 - decay) * master after every optimizer step, from the first, in fp32, for this
rank's owned ranges only; it lives where the masters live (GPU or CPU) and is never a second model.
"""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from bagel_ds.ranges import Pieces, WeightSource
from bagel_ds.zero.partitions import MASTER, Partitions, group_pieces


class ShardedEMA:
    """`values[i]` is the average of `partitions.groups[i]`, laid out like its master; empty where not owned."""

    def __init__(self, partitions: Partitions, decay: float):
        self._partitions, self.decay = partitions, decay
        self._values: dict[int, Tensor] = {}

    def start_from_masters(self) -> None:
        for group in self._partitions.groups:
            if group.owned:
                with self._partitions.open(group) as flats:
                    self._values[group.index] = flats[MASTER].detach().clone()

    def load(self, source: WeightSource) -> None:
        """Values from a model file or from a training state."""
        self.start_from_masters()
        for piece in self.pieces():
            for held, values in piece.ranges:
                values.copy_(source.read(*held))

    @torch.no_grad()
    def update(self) -> None:
        for group in self._partitions.groups:
            if group.owned:
                with self._partitions.open(group) as flats:
                    self._values[group.index].mul_(self.decay).add_(flats[MASTER], alpha=1 - self.decay)

    def pieces(self) -> Iterator[Pieces]:
        """This rank's share, name by name in an order all ranks share."""
        for group in self._partitions.groups:
            yield from group_pieces(group, self._values.get(group.index, torch.empty(0)))
