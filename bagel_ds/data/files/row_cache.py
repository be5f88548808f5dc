"""Parquet rows of one process: each row group is read as rarely as memory allows.

Guarantees: at most `limit` bytes of rows are kept, plus the batch being read and the largest page of the file.
Announced rows (`expect`) are kept until their use, the soonest first, and no others of their row group. So a worker
whose share of a window fits reads each row group once; one whose share is n times `limit` reads it about n times.
Without announcements everything that fits is kept. The content of rows does not matter here.

Why not single pages: a row group of pictures as pyarrow writes it is one dictionary page per column, however large
(the page limit is checked every 1024 values), so there is nothing smaller than a row group to read.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any, Callable, NamedTuple

Row = dict[str, Any]
Version = tuple[str, int, int]

LIMIT = 384 * 2**20
_LATER = 2**100  # unannounced rows are due after all announced ones
_SPAN = 2**40  # of the last row group first, and there the next ones in file order
_ROW_BYTES = 200  # of python's own, per row


class GroupKey(NamedTuple):
    """A row group as it is read."""

    path: str
    group: int
    columns: tuple[str, ...]


# Rows of a row group in order, from the first; each gives its values when called, and may raise then.
ReadsRows = Callable[[GroupKey], Iterator[Callable[[], Row]]]


class _Kept(NamedTuple):
    values: Row
    size: int
    due: int


class RowCache:
    """`read` streams a row group."""

    def __init__(self, read: ReadsRows, limit: int = LIMIT) -> None:
        self._read, self._limit = read, limit
        self.clear()

    def clear(self) -> None:
        """Forget rows and announcements."""
        self._turns = count()
        self._due: dict[GroupKey, dict[int, deque[int]]] = {}
        self._kept: dict[tuple[GroupKey, int], _Kept] = {}
        self._versions: dict[str, Version] = {}
        self._queue: list[tuple[int, GroupKey, int]] = []  # (-due, group, row); stale where `_kept` says otherwise
        self.bytes = 0

    def expect(self, key: GroupKey, row: int) -> None:
        """`row` will be asked for once more, after all rows announced before."""
        turn = next(self._turns)
        self._due.setdefault(key, {}).setdefault(row, deque()).append(turn)
        kept = self._kept.get((key, row))
        if kept is not None and turn < kept.due:
            self._keep(key, row, kept.values, turn)

    def row(self, key: GroupKey, row: int, version: Version) -> Row:
        """The row; it is read again when the file's `version` is another one than before. Raises what reading does."""
        if self._versions.get(key.path) != version:
            self._forget(key.path)
            self._versions[key.path] = version
        announced = self._used(key, row)
        kept = self._drop(key, row)
        values = kept.values if kept else self._read_group(key, row, announced)
        if not announced or self._next_use(key, row) is not None:
            use = self._next_use(key, row)
            self._keep(key, row, values, _LATER - next(self._turns) * _SPAN + _SPAN - 1 if use is None else use)
        return values

    def _read_group(self, key: GroupKey, row: int, announced: bool) -> Row:
        """Read on to the last row that is wanted; the wanted ones that fit are kept."""
        wanted = self._due.get(key, {})
        everything = not announced and not wanted
        last = -1 if everything else max([row, *wanted])
        turn = next(self._turns)
        found: Row | None = None
        for number, values in enumerate(self._read(key)):
            if number == row:
                found = values()
            elif everything or (number in wanted and (key, number) not in self._kept):
                due = _LATER - turn * _SPAN + (number - row) % _SPAN if everything else wanted[number][0]
                with suppress(Exception):  # of another row than the one asked for, which will say so when it is
                    if not self._keep(key, number, values(), due) and everything and found is not None:
                        break
            if number == last:
                break
        if found is None:
            raise IndexError(f"the row group has no row {row}")
        return found

    def _keep(self, key: GroupKey, row: int, values: Row, due: int) -> bool:
        """Whether the row is among the soonest that fit."""
        size = _size(values) + _ROW_BYTES
        self._drop(key, row)
        if size > self._limit:
            return False
        self._kept[key, row] = _Kept(values, size, due)
        self.bytes += size
        heapq.heappush(self._queue, (-due, key, row))
        while self.bytes > self._limit:
            later, group, number = heapq.heappop(self._queue)
            kept = self._kept.get((group, number))
            if kept is not None and kept.due == -later:
                self._drop(group, number)
        if len(self._queue) > 64 + 4 * len(self._kept):
            self._queue = [(-kept.due, *place) for place, kept in self._kept.items()]
            heapq.heapify(self._queue)
        return (key, row) in self._kept

    def _drop(self, key: GroupKey, row: int) -> _Kept | None:
        kept = self._kept.pop((key, row), None)
        self.bytes -= kept.size if kept else 0
        return kept

    def _next_use(self, key: GroupKey, row: int) -> int | None:
        turns = self._due.get(key, {}).get(row)
        return turns[0] if turns else None

    def _used(self, key: GroupKey, row: int) -> bool:
        """Strike off the next announced use; False where none was announced."""
        rows = self._due.get(key, {})
        if row not in rows:
            return False
        rows[row].popleft()
        if not rows[row]:
            del rows[row]
        if not rows:
            del self._due[key]
        return True

    def _forget(self, path: str) -> None:
        for key, row in [place for place in self._kept if place[0].path == path]:
            self._drop(key, row)


def _size(value: Any) -> int:
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
