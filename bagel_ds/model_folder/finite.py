"""Finds a NaN or an infinity in weights while they are loaded.

Guarantees: every element that is read before `check` is checked as it is read, so nothing is read twice. The message
names tensor and element. Each rank checks what it reads; together they read every weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.ranges import TensorInfo, WeightSource

_REMEDY = (
    "Download or copy the weights again. If a training run wrote them, it had diverged: use an earlier checkpoint of it"
)


def first_not_finite(values: Tensor) -> int | None:
    """Index of the first NaN or infinity of a 1-D tensor, or None. One pass if there is none."""
    if not values.is_floating_point() or values.numel() == 0:
        return None
    low, high = torch.aminmax(values)  # both are NaN if any element is
    if torch.isfinite(low) and torch.isfinite(high):
        return None
    return int(torch.isfinite(values).logical_not().nonzero()[0])


class CheckedWeights:
    """A `WeightSource` that checks the values it returns until `check` is called."""

    def __init__(self, source: WeightSource, where: str):
        self._source, self._where = source, where
        self._found: dict[str, str] | None = {}  # tensor -> its first bad element; None after `check`

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        values = self._source.read(name, start, numel)
        if self._found is not None and name not in self._found:
            bad = first_not_finite(values)
            if bad is not None:
                self._found[name] = f"{float(values[bad])} at element {start + bad:,}"
        return values

    def check(self) -> None:
        """Raise `UserError` if any value read so far was not finite. Later reads are not checked."""
        found, self._found = self._found, None
        if found:
            raise UserError(not_finite_fault(self._where, found))


def not_finite_fault(where: str, found: dict[str, str]) -> str:
    """The message about tensors and the first bad element of each."""
    (name, element), *others = found.items()
    more = ", ".join(other for other, _ in others[:3]) + (f", ... ({len(others)} in all)" if len(others) > 3 else "")
    return f"{where}: tensor {name} holds {element}" + (f"; so do {more}" if others else "") + f". {_REMEDY}."
