"""A network of tables of any size, for what depends on sizes and not on what a network computes.

Guarantees: every element of every table has a gradient that changes with the seed, so nothing that is stale or in the
wrong place goes unnoticed; the start values are the same for the same sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bagel_ds.ranges import TensorInfo


class Table(nn.Module):
    """One parameter; its loss is the squared distance from a target that changes with `seed`."""

    def __init__(self, numel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(numel))

    def forward(self, seed: int) -> Tensor:
        positions = torch.arange(self.weight.numel(), dtype=torch.float32, device=self.weight.device)
        target = torch.sin(positions * 0.37 + seed).to(self.weight.dtype)
        return (self.weight - target).float().square().sum()


class Tables(nn.Module):
    def __init__(self, sizes: list[int]):
        super().__init__()
        self.tables = nn.ModuleList([Table(numel) for numel in sizes])

    def forward(self, seed: int) -> Tensor:
        return torch.stack([table(seed + 7 * i) for i, table in enumerate(self.tables)]).sum()


class RandomSource:
    """A weight source: normal values, the same for the same name."""

    def __init__(self, sizes: list[int]):
        self._values = {
            f"tables.{i}.weight": torch.randn(numel, generator=torch.Generator().manual_seed(i))
            for i, numel in enumerate(sizes)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(torch.float32, tuple(self._values[name].shape))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        return self._values[name][start : None if numel is None else start + numel]
