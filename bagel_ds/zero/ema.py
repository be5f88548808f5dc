"""Exponential moving average of the weights, sharded beside the optimizer's masters.

Guarantees: ema = decay * ema + (1 - decay) * master after every optimizer step, from the first, in fp32, for this
rank's owned ranges only; with `every` k it is done after every k-th step with decay^k. It lives where the masters live
(GPU, CPU, or a mapped file on NVMe) and is never a second model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from bagel_ds.ranges import Pieces, WeightSource
from bagel_ds.zero.partitions import MASTER, Group, Partitions, group_pieces


class ShardedEMA:
    """Registers itself with the partitions: every optimizer step then updates it, group by group.

    `folder`, where given, holds the values in mapped files instead of memory. `steps_done` is where a resumed run
    stands, so that `every` keeps its rhythm.
    """

    def __init__(
        self, partitions: Partitions, decay: float, every: int = 1, folder: Path | None = None, steps_done: int = 0
    ):
        self._partitions, self.decay, self._every = partitions, decay, every
        self._folder = folder
        self._values: dict[int, Tensor] = {}
        self._updates: dict[int, int] = {group.index: steps_done for group in partitions.groups}
        for group in partitions.groups:
            if group.owned:
                with partitions.open(group) as flats:
                    self._values[group.index] = self._allocate(group, flats[MASTER]).copy_(flats[MASTER])
        partitions.on_update(self._update)

    def load(self, source: WeightSource) -> None:
        """Replace the values, which start at the masters, by those of a model file or of a training state."""
        for piece in self.pieces():
            for held, values in piece.ranges:
                values.copy_(source.read(*held))

    def pieces(self) -> Iterator[Pieces]:
        """This rank's share, name by name in an order all ranks share."""
        for group in self._partitions.groups:
            yield from group_pieces(group, self._values.get(group.index, torch.empty(0)))

    @torch.no_grad()
    def _update(self, group: Group, master: Tensor) -> None:
        self._updates[group.index] += 1
        if group.owned and self._updates[group.index] % self._every == 0:
            decay = self.decay**self._every
            self._values[group.index].lerp_(master.float(), 1 - decay)  # exact where the two are equal

    def _allocate(self, group: Group, like: Tensor) -> Tensor:
        if self._folder is None:
            return torch.empty_like(like, dtype=torch.float32)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"group_{group.index}.ema"
        return torch.from_file(str(path), shared=True, size=like.numel(), dtype=torch.float32)
