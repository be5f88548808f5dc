"""The rows of a stream that no sample can be made of: counted, and the first ones named in the log.

Guarantees: a row counts once, however often num_used_data repeats its file. Counting costs what is new since the last
time, and memory of 12 bytes per row that planning refuses; reasons that the index knows stay in the index.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from bagel_ds.data.index.index import FileIndex
from bagel_ds.data.index.records import WHOLE_FILE
from bagel_ds.data.streams.reader import RowPlace, UnusableRow
from bagel_ds.data.streams.row_sets import RowSet

logger = logging.getLogger("bagel_ds")

_NAMED_ROWS = 5  # rows of each dataset that the log names


class UnusableRows:
    """`files`: (dataset, index, its first row) of each file once; `place`: where one of the `rows` lies."""

    def __init__(
        self, files: Sequence[tuple[str, FileIndex, int]], rows: int, place: Callable[[int], RowPlace]
    ) -> None:
        self._files, self._place = files, place
        self._uncounted = list(files)  # not indexed when last looked at
        self._bad: Counter[str] = Counter()  # by dataset
        self._long: Counter[str] = Counter()
        self._named: Counter[str] = Counter()
        self._unnamed: Counter[str] = Counter()  # since the log last said how many
        self.too_long = RowSet(rows)  # rows with a sample longer than max_num_tokens_per_sample, as met so far
        self._seen = RowSet(rows)
        self._refused, self._reason_ids, self._reasons = array("q"), array("l"), dict[str, int]()

    def refuse(self, row: int, reason: str) -> None:
        """Planning found that no sample can be made of `row`."""
        if not self._seen.add(row):
            return
        self._refused.append(row)
        self._reason_ids.append(self._reasons.setdefault(reason, len(self._reasons)))
        place = self._place(row)
        self._bad[place.dataset] += 1
        if self._named[place.dataset] < _NAMED_ROWS:
            self._name(UnusableRow(place, reason))
        else:
            self._unnamed[place.dataset] += 1

    def is_too_long(self, row: int) -> None:
        """Planning met a sample of `row` that is too long."""
        if self.too_long.add(row):
            self._long[self._place(row).dataset] += 1

    def counts(self) -> Counter[str]:
        """Unusable rows by dataset: of the files indexed so far, and those that planning has met; logs new ones."""
        self._count()
        return self._bad + self._long

    def __len__(self) -> int:
        """Without those that are too long."""
        self._count()
        return self._bad.total()

    def __iter__(self) -> Iterator[UnusableRow]:
        for dataset, index, start in self._files:
            yield from (self._at(dataset, index, start, *bad) for bad in index.bad)
        reasons = list(self._reasons)
        for row, reason in zip(self._refused, self._reason_ids, strict=True):
            yield UnusableRow(self._place(row), reasons[reason])

    def _count(self) -> None:
        indexed = [file for file in self._uncounted if file[1].is_indexed]
        if indexed:
            self._uncounted = [file for file in self._uncounted if not file[1].is_indexed]
        for dataset, index, start in indexed:
            found = len(index.records.bad)
            first = list(islice(index.bad, max(0, _NAMED_ROWS - self._named[dataset])))
            for bad in first:
                self._name(self._at(dataset, index, start, *bad))
            self._bad[dataset] += found
            self._unnamed[dataset] += found - len(first)
        for dataset, rest in (+self._unnamed).items():
            logger.warning("%s: %d more rows are skipped", dataset, rest)
        self._unnamed.clear()

    def _at(self, dataset: str, index: FileIndex, start: int, row: int, reason: str) -> UnusableRow:
        place = RowPlace(dataset, index.path, -1, -1) if row == WHOLE_FILE else self._place(start + row)
        return UnusableRow(place, reason)

    def _name(self, row: UnusableRow) -> None:
        self._named[row.place.dataset] += 1
        logger.warning("%s is skipped: %s", row.place, row.reason)
