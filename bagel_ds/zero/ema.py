"""Exponential moving average of the weights, sharded beside the optimizer's masters.

Guarantees: ema = decay * ema + (1 - decay) * master after every optimizer step, from the first, for this rank's owned
ranges only; with `every` k it is done after every k-th step with decay^k. It lives where the masters live (GPU, CPU, or
a mapped file on NVMe) and is never a second model. In fp32 it is exact to fp32 rounding; in bf16 each update is rounded
stochastically (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"): an average moves by parts in ten
thousand, which rounding to nearest would lose for ever and this keeps on average.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.ranges import MASTER, Pieces, WeightSource, copy_range
from bagel_ds.units import GIB
from bagel_ds.zero.partitions import Group, Partitions, group_pieces

_CHUNK = 2**24  # elements updated at once


class EMAOptions(NamedTuple):
    """`folder`, where given, holds the values in mapped files instead of memory. `updates_done` is where a resumed run
    stands, so that `every` keeps its rhythm."""

    decay: float
    every: int = 1
    dtype: torch.dtype = torch.float32
    folder: Path | None = None
    updates_done: int = 0


class ShardedEMA:
    """Registers itself with the partitions: every optimizer step then updates it, group by group."""

    def __init__(self, partitions: Partitions, options: EMAOptions):
        self._partitions, self._options = partitions, options
        self._values: dict[int, Tensor] = {}
        self._updates: dict[int, int] = {group.index: options.updates_done for group in partitions.groups}
        for group in partitions.groups:
            if group.owned:
                with partitions.open(group) as flats:
                    self._values[group.index] = self._allocate(group, flats[MASTER]).copy_(flats[MASTER])
        partitions.on_update(self._update)

    def load(self, source: WeightSource) -> None:
        """Replace the values, which start at the masters, by those of a model file or of a training state."""
        for piece in self.pieces():
            for held, values in piece.ranges:
                copy_range(values, held, source.read)

    def values(self, group: Group) -> Tensor:
        """The average of an owned group, laid out like its master."""
        return self._values[group.index]

    def pieces(self) -> Iterator[Pieces]:
        """This rank's share, name by name in an order all ranks share."""
        for group in self._partitions.groups:
            yield from group_pieces(group, self._values.get(group.index, torch.empty(0)))

    @torch.no_grad()
    def _update(self, group: Group, master: Tensor) -> None:
        self._updates[group.index] += 1
        if not group.owned or self._updates[group.index] % self._options.every:
            return
        values, weight = self._values[group.index], 1 - self._options.decay**self._options.every
        generator = torch.Generator(values.device).manual_seed(self._updates[group.index] * 100_003 + group.index)
        # In pieces: masters may be bf16, and an fp32 copy of a whole group is 4 bytes for each of them.
        for chunk, target in zip(values.split(_CHUNK), master.split(_CHUNK)):
            if chunk.dtype == torch.float32:
                chunk.lerp_(target.float(), weight)  # exact where the two are equal
            else:
                chunk.copy_(round_stochastically(chunk.float().lerp_(target.float(), weight), generator))

    def _allocate(self, group: Group, like: Tensor) -> Tensor:
        if self._options.folder is None:
            return torch.empty_like(like, dtype=self._options.dtype)
        self._options.folder.mkdir(parents=True, exist_ok=True)
        path = self._options.folder / f"group_{group.index}.ema"
        _reserve(path, like.numel() * self._options.dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=like.numel(), dtype=self._options.dtype)


def _reserve(path: Path, nbytes: int) -> None:
    """Make a file of `nbytes` that has its place on the disk: a full one would end a mapping's writer by SIGBUS."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        raise UserError(
            f"--nvme_path: {path} can't hold {nbytes / GIB:.2f} GiB of the moving average ({error.strerror}); free "
            "some there, take another disk, or a preset that keeps more in memory (zero3_cpu)."
        ) from None


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values rounded up or down to neighbouring bf16 ones, with chances that keep the mean; still fp32."""
    bits = values.view(torch.int32)
    below = torch.randint(0, 2**16, bits.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((bits + below) & -(2**16)).view(torch.float32)
