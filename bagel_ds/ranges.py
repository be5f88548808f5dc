"""Flat ranges of named tensors: how ZeRO partitions and files exchange weights and states.

Guarantees: a `Range` always refers to the flattened, unpadded parameter, so ranges written by any number of ranks can
be read by any other number.
"""

from __future__ import annotations

from math import prod
from typing import Callable, NamedTuple, Protocol

import torch
from torch import Tensor

from bagel_ds.machine.liveness import going_on

MASTER = "master"  # kind of range: the weights the optimizer updates, as ZeRO partitions and training states name them
COPIED_ELEMENTS = 2**24  # at a time


class Range(NamedTuple):
    """Elements [start, start + numel) of the flattened tensor `name`."""

    name: str
    start: int
    numel: int


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Pieces(NamedTuple):
    """What one rank holds of the tensor `name`, possibly nothing. Values are 1-D, of any dtype, on any device.

    Producers yield the same names in the same order on every rank. Tensors are valid until the next name.
    """

    name: str
    ranges: list[tuple[Range, Tensor]]


class WeightSource(Protocol):
    """Anything from which flat ranges of named tensors can be read."""

    def __contains__(self, name: str) -> bool: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor, 1-D, in the source's dtype."""
        ...


def copy_range(target: Tensor, held: Range, read: Callable[[str, int, int], Tensor]) -> int:
    """Fill the 1-D `target` with the range `held`, read by `read(name, start, numel)`. Returns the bytes read.

    It reads in chunks to limit the memory beyond `target`: a rank's share of the 7B's embedding is 1 GB in fp32.
    """
    assert target.numel() == held.numel, (target.shape, held)
    size = 0
    for offset in range(0, held.numel, COPIED_ELEMENTS):
        values = read(held.name, held.start + offset, min(COPIED_ELEMENTS, held.numel - offset))
        target.narrow(0, offset, values.numel()).copy_(values)
        size += values.nbytes
        going_on()
    return size
