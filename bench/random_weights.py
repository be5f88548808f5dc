"""Weights of a network of any size that are made where they are read, from no file.

Guarantees: an element depends on its tensor's name and its place only, so any cut into ranges gives the same weights.
The weights train (norms are 1, the rest small), they know nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from bagel_ds.ranges import TensorInfo

_POOL = 2**22 + 7  # elements that repeat; of no common divisor with a layer's width, so rows of a weight differ
_SPREAD = 0.02


class RandomWeights:
    """A `WeightSource` in bf16 on `device`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu"):
        self._shapes = dict(shapes)
        pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)) * _SPREAD
        self._pool = pool.bfloat16().to(device)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(torch.bfloat16, self._shapes[name])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        numel = self.info(name).numel - start if numel is None else numel
        if "norm" in name and name.endswith("weight"):
            return self._pool.new_ones(numel)
        digest = hashlib.sha256(name.encode()).digest()
        first = (int.from_bytes(digest[:8], "little") + start) % _POOL
        turned = self._pool.roll(-first)
        return turned.repeat(-(-numel // _POOL))[:numel] if numel > _POOL else turned[:numel]
