"""Weights that are looked at while they are loaded: a NaN or an infinity is found where it enters the run.

Guarantees: every element that is read before `check` is looked at, in the pieces in which it is read anyway, so nothing
is read twice; the message names tensor and element. What a rank does not read, another rank that holds it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.ranges import TensorInfo, WeightSource

_REMEDY = (
    "Download or copy the weights again; if a training run has written them, it had diverged: take an earlier "
    "checkpoint of it"
)


def first_not_finite(values: Tensor) -> int | None:
    """Index of the first NaN or infinity of a 1-D tensor. One pass where there is none, several times that of a sum."""
    if not values.is_floating_point() or values.numel() == 0:
        return None
    low, high = torch.aminmax(values)  # both are NaN where any element is
    if torch.isfinite(low) and torch.isfinite(high):
        return None
    return int(torch.isfinite(values).logical_not().nonzero()[0])


class CheckedWeights:
    """A `WeightSource` that looks at what it hands out until `check` is called."""

    def __init__(self, source: WeightSource, where: str):
        self._source, self._where = source, where
        self._found: dict[str, str] | None = {}  # tensor -> its first bad element; None: no longer looked for

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
        """Raise `UserError` where anything read so far was not finite; what is read later is not looked at."""
        found, self._found = self._found, None
        if found:
            raise UserError(not_finite_fault(self._where, found))


def not_finite_fault(where: str, found: dict[str, str]) -> str:
    """The message about tensors and the first bad element of each."""
    (name, element), *others = found.items()
    more = ", ".join(other for other, _ in others[:3]) + (f", ... ({len(others)} in all)" if len(others) > 3 else "")
    return f"{where}: tensor {name} holds {element}" + (f"; so do {more}" if others else "") + f". {_REMEDY}."
