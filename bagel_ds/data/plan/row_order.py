"""The order in which a group's rows are used: endless, two-level, random access.

Guarantees: each epoch holds every row of every unit exactly once; the order depends only on (seed, group, epoch) and
the units, on no generator whose algorithm may change between versions; any position can be reached without replaying
what comes before. Units (row groups) are permuted, then rows are permuted within windows of consecutive units, so
that a reader meets each unit in one window only. It does not know which rows are usable.
"""

from __future__ import annotations

import hashlib
from typing import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

ROW_ORDER = 2  # version of this order: saved states hold positions in it
WINDOW_ROWS = 1024  # rows that are shuffled among each other, at least
WINDOW_UNITS = 2  # and at least so many units, however large they are

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def stable_key(*values: int | str) -> int:
    """A 64-bit number that depends only on the values."""
    text = "\0".join(str(value) for value in values)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(count: int, key: int) -> NDArray[np.int64]:
    """0..count-1 in an order drawn by SplitMix64 (Steele, Lea, Flood 2014) from `key`."""
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * _MIX[0]
        x = (x ^ (x >> np.uint64(27))) * _MIX[1]
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


def _window_starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where windows of consecutive units begin: each the shortest of WINDOW_ROWS rows and WINDOW_UNITS units."""
    ends = np.cumsum(lengths)
    starts = [0]
    while True:
        begin = starts[-1]
        before = int(ends[begin - 1]) if begin else 0
        enough_rows = int(np.searchsorted(ends, before + WINDOW_ROWS)) + 1
        following = max(enough_rows, begin + WINDOW_UNITS)
        if following >= len(lengths):
            return np.array(starts)
        starts.append(following)


class RowOrder:
    """A cursor over the endless sequence of (epoch, row) of one group; `epoch` and `position` are its whole state."""

    def __init__(self, units: Sequence[range], seed: int, name: str) -> None:
        self._units = [unit for unit in units if len(unit)]
        self._seed, self._name = seed, name
        self.rows_per_epoch = sum(len(unit) for unit in self._units)
        assert self.rows_per_epoch, f"group {name} has no rows"
        self.move_to(0, 0)

    def move_to(self, epoch: int, position: int) -> None:
        """Continue at the `position`-th row of `epoch`."""
        self.epoch, self.position = epoch, position
        self._enter_epoch()

    def next(self) -> tuple[int, int]:
        """(epoch, row), and one step on."""
        if self.position == self.rows_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
            self._enter_epoch()
        elif self.position >= self._window_end:
            self._enter_window()
        row = self._rows[self.position - self._window_begin]
        self.position += 1
        return self.epoch, row

    def units_ahead(self) -> Iterator[range]:
        """Every unit once, in the order in which rows of it come next; the window under way is not divided."""
        window = int(np.searchsorted(self._row_starts, self.position, side="right")) - 1
        this_epoch = self._order[int(self._unit_starts[window]) :].tolist()
        following = permutation(len(self._units), self._units_key(self.epoch + 1)).tolist()
        for unit in dict.fromkeys([*this_epoch, *following]):
            yield self._units[unit]

    def _units_key(self, epoch: int) -> int:
        return stable_key(self._seed, self._name, epoch, "units")

    def _enter_epoch(self) -> None:
        order = permutation(len(self._units), self._units_key(self.epoch))
        lengths = np.fromiter((len(self._units[i]) for i in order), np.int64, len(order))
        self._order = order
        self._unit_starts = _window_starts(lengths)
        rows_before = np.concatenate([[0], np.cumsum(lengths)])
        self._row_starts = rows_before[self._unit_starts]
        self._enter_window()

    def _enter_window(self) -> None:
        window = int(np.searchsorted(self._row_starts, self.position, side="right")) - 1
        first = int(self._unit_starts[window])
        last = int(self._unit_starts[window + 1]) if window + 1 < len(self._unit_starts) else len(self._order)
        units = (self._units[i] for i in self._order[first:last])
        rows = np.concatenate([np.arange(unit.start, unit.stop, unit.step) for unit in units])
        key = stable_key(self._seed, self._name, self.epoch, "rows", window)
        self._rows: list[int] = rows[permutation(len(rows), key)].tolist()
        self._window_begin = int(self._row_starts[window])
        self._window_end = self._window_begin + len(rows)
