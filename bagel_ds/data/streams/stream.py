"""GroupStream: a group of datasets as numbered rows that can be planned, described and read.

Guarantees: `plan_sample` makes a sample from the index and counter-based draws alone (no file is touched), its length
exact; the same in every process. Rows that cannot be used are None there, counted, and named once. Reading gives each
row or the reason why not, never an exception.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from bagel_ds.data.formats.record import VERSION, ParsedRow, Record, decode_record
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.data.formats.source import Piece
from bagel_ds.data.index.index import FileIndex
from bagel_ds.data.plan.planner import digest_of
from bagel_ds.data.samples.draws import Draws, draw_key
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, BadRow, Entry, SamplePlan
from bagel_ds.data.streams.reader import RowAddress, RowPlace, StreamReader
from bagel_ds.model_folder.tokenizer import Tokenizer

logger = logging.getLogger("bagel_ds")

_KNOWN_SIZES = 100_000
_NAMED_ROWS = 5  # bad rows of a dataset that the log names; all are in `bad_rows`


@dataclass(frozen=True)
class SampleOptions:
    """What planning a sample depends on besides its row; probabilities 0 to 1."""

    max_num_tokens_per_sample: int = 16384
    text_cond_dropout_prob: float = 0.1
    vit_cond_dropout_prob: float = 0.3
    vae_cond_dropout_prob: float = 0.3
    seed: int = 42
    visual_und: bool = True
    visual_gen: bool = True
    layout: LayoutOptions = LayoutOptions()


@dataclass(frozen=True)
class FileUse:
    """One use of a file: a file repeated by num_used_data is several uses of one index."""

    dataset: str
    index: FileIndex

    @property
    def folder(self) -> str:
        """Where the images lie that lines name."""
        return self.index.file.folder


class UnusableRow(NamedTuple):
    """A row that no sample can be made of; `row` -1: the whole file."""

    dataset: str
    file: str
    row_group: int
    row: int
    reason: str

    @property
    def words(self) -> str:
        """ "<dataset>: <file> row group g row r", for messages."""
        if self.row < 0:
            return f"{self.dataset}: {self.file} as a whole"
        return str(RowPlace(*self[:4]))


class GroupStream:
    """See the module. `group` counts the groups of the run."""

    def __init__(
        self,
        group: int,
        name: str,
        kind: str,
        uses: Sequence[FileUse],
        transforms: tuple[ImageTransform | None, ImageTransform | None],
        options: SampleOptions,
        tokenizer: Tokenizer,
        weight: float = 1.0,
        is_mandatory: bool = False,
    ) -> None:
        self.group = group
        self.name = name
        self.kind = kind
        self.weight = weight
        self.is_mandatory = is_mandatory
        self.uses = tuple(uses)
        self.datasets = tuple(dict.fromkeys(use.dataset for use in uses))
        self.vae_transform, self.vit_transform = transforms
        self.options = options
        self.special = tokenizer.special
        self._text_lengths = f"{VERSION} {tokenizer.fingerprint}"
        self.source = KINDS[kind]
        self.reader = StreamReader(name, self.source, *transforms)
        self.units: list[range] = []
        self._starts: list[int] = []  # first row of each use
        self._first_units: list[int] = []  # first unit of each use
        row = 0
        for use in self.uses:
            self._starts.append(row)
            self._first_units.append(len(self.units))
            for rows in use.index.unit_rows.tolist():
                self.units.append(range(row, row + rows))
                row += rows
        self.rows = row
        self._unit_starts = [unit.start for unit in self.units]
        self._bad_rows: list[UnusableRow] = []
        self._told = 0  # of `_bad_rows`
        once = {(use.dataset, use.index.path): (use, start) for use, start in zip(self.uses, self._starts)}
        self._unlisted = list(once.values())  # a file used several times is listed once
        self.too_long: set[int] = set()  # rows with a sample longer than max_num_tokens_per_sample, as met so far
        self._found_bad: set[int] = set()
        self._sizes: dict[tuple[str, int, int, int], tuple[int, int, int]] = {}
        self._choice_key = draw_key("choice", options.seed, name)
        self._dropout_key = draw_key("dropout", options.seed, name)
        chances = {
            TEXT: options.text_cond_dropout_prob,
            VIT: options.vit_cond_dropout_prob,
            VAE: options.vae_cond_dropout_prob,
        }
        self._chances = chances if self.source.conditions_drop and any(chances.values()) else {}
        self._named: Counter[str] = Counter()

    @property
    def fingerprint(self) -> str:
        """Of everything a plan depends on; equal on all hosts that hold the same data, wherever it lies."""
        settings = (self.group, self.name, self.kind, self.weight, self.is_mandatory, self._text_lengths)
        files = [(use.dataset, use.index.digest) for use in self.uses]
        return digest_of([settings, self.vae_transform, self.vit_transform, self.options, self.special, files])

    @property
    def rows_fingerprint(self) -> str:
        """Of the rows only: equal as long as row numbers mean the same. Training states hold it: keep it as it is."""
        digest = hashlib.blake2b(repr((self.group, self.name, self.kind)).encode(), digest_size=16)
        for use in self.uses:
            digest.update(f"{use.dataset} {use.index.digest}\n".encode())
        return digest.hexdigest()

    @property
    def bad_rows(self) -> list[UnusableRow]:
        """Rows that no sample can be made of, each once: of the files indexed so far, and those planning has met."""
        indexed = [(use, start) for use, start in self._unlisted if use.index.is_indexed]
        if indexed:
            self._unlisted = [(use, start) for use, start in self._unlisted if not use.index.is_indexed]
        for use, start in indexed:
            for row, reason in use.index.bad:
                place = self.place(start + row) if row >= 0 else RowPlace(use.dataset, use.index.path, -1, -1)
                self._bad_rows.append(UnusableRow(*place, reason))
        return self._bad_rows

    def tell_bad_rows(self) -> None:
        """Name in the log those of `bad_rows` that are new, the first few of each dataset."""
        rows = self.bad_rows
        unnamed: Counter[str] = Counter()
        for row in rows[self._told :]:
            self._named[row.dataset] += 1
            if self._named[row.dataset] <= _NAMED_ROWS:
                logger.warning("%s is skipped: %s", row.words, row.reason)
            else:
                unnamed[row.dataset] += 1
        for dataset, rest in unnamed.items():
            logger.warning("%s: %d more rows are skipped", dataset, rest)
        self._told = len(rows)

    def plan_sample(self, row: int, epoch: int) -> SamplePlan | None:
        """The sample of `row` in `epoch`, every choice made; None where there is none (see `bad_rows`, `too_long`)."""
        number = bisect.bisect_right(self._starts, row) - 1
        index, local = self.uses[number].index, row - self._starts[number]
        start, stop = index.offsets[local : local + 2].tolist()
        if start == stop:
            return None
        record = decode_record(index.numbers[start:stop].tolist())
        pieces = self.source.arrange(record, Draws(self._choice_key, epoch, row))
        try:
            entries = self._entries(pieces, record)
        except BadRow as error:
            self._note_bad(row, str(error))
            return None
        if sum([entry.tokens + 2 for entry in entries]) > self.options.max_num_tokens_per_sample:
            self.too_long.add(row)
            return None
        return SamplePlan(self.group, epoch, row, self._with_dropout(entries, epoch, row))

    def place(self, row: int) -> RowPlace:
        """The file, row group and row of a row number."""
        number = bisect.bisect_right(self._starts, row) - 1
        use, local = self.uses[number], row - self._starts[number]
        if len(use.index.places):
            return RowPlace(use.dataset, use.index.path, -1, int(use.index.places[local, 2]))
        unit = bisect.bisect_right(self._unit_starts, row) - 1
        return RowPlace(use.dataset, use.index.path, unit - self._first_units[number], row - self._unit_starts[unit])

    def index_of(self, row: int) -> FileIndex:
        """The index of the file that a row lies in."""
        return self.uses[bisect.bisect_right(self._starts, row) - 1].index

    def rows_of(self, dataset: str) -> list[range]:
        """Row numbers of one of `datasets`."""
        stops = [*self._starts[1:], self.rows]
        parts = zip(self.uses, self._starts, stops, strict=True)
        return [range(start, stop) for use, start, stop in parts if use.dataset == dataset]

    def describe(self, plan_or_row: SamplePlan | int) -> str:
        """ "<dataset>: <file> row group g row r", for messages."""
        return str(self.place(plan_or_row if isinstance(plan_or_row, int) else plan_or_row.row))

    def address(self, row: int) -> RowAddress:
        """How to read a row in any process."""
        number = bisect.bisect_right(self._starts, row) - 1
        use, place = self.uses[number], self.place(row)
        offset = length = 0
        if place.row_group < 0:
            offset, length, _ = use.index.places[row - self._starts[number]].tolist()
        return RowAddress(place, use.folder, use.index.columns, offset, length)

    def read(self, plans: Sequence[SamplePlan]) -> list[ParsedRow | BadRow]:
        """The rows of `plans` as they are in the files."""
        return [self.reader.read(self.address(plan.row)) for plan in plans]

    def _entries(self, pieces: list[Piece], record: Record) -> list[Entry]:
        """Pieces with their sizes, modalities that are switched off taken out. Raises `BadRow`."""
        options = self.options
        sharing = self.reader.sharing(len(record.image_sizes), pieces)
        entries = []
        for kind, content, loss, special, frame in pieces:
            if kind == TEXT:
                loss = loss and options.visual_und
                label = getattr(self.special, special) if special and loss else -1
                entries.append(Entry(TEXT, content, record.text_lengths[content], loss, False, label))
            elif options.visual_und if kind == VIT else options.visual_gen:
                tokens, height, width = self._image_tokens(kind, *record.image_sizes[content], sharing)
                entries.append(Entry(kind, content, tokens, loss, False, -1, height, width, frame))
        losses = {entry.kind for entry in entries if entry.loss}
        if not losses:
            raise BadRow("no text or image with a loss")
        if losses == {TEXT} and self.source.conditions_drop and options.text_cond_dropout_prob >= 1:
            raise BadRow("text_cond_dropout_prob drops every text with a loss")
        return entries

    def _image_tokens(self, kind: str, width: int, height: int, sharing: int) -> tuple[int, int, int]:
        """(tokens, height, width after the resize) of an image; data sets hold few sizes, so they are remembered."""
        key = (kind, width, height, sharing)
        known = self._sizes.get(key)
        if known is None:
            known = _image_tokens(self, kind, width, height, sharing)
            if len(self._sizes) >= _KNOWN_SIZES:
                self._sizes.clear()
            self._sizes[key] = known
        return known

    def _with_dropout(self, entries: list[Entry], epoch: int, row: int) -> tuple[Entry, ...]:
        """Each condition dropped with its probability; drawn again where that leaves no loss at all.

        A noised image is never dropped; a text is, even with a loss, as in the original.
        """
        chances = self._chances
        if not chances:
            return tuple(entries)
        for attempt in count():
            uniform = Draws(self._dropout_key, epoch, row, attempt).uniform
            drawn = tuple(
                entry._replace(dropped=True)
                if uniform() < chances[entry.kind] and not (entry.loss and entry.kind == VAE)
                else entry
                for entry in entries
            )
            if any(entry.loss and not entry.dropped for entry in drawn):
                return drawn
        raise AssertionError("unreachable")

    def _note_bad(self, row: int, reason: str) -> None:
        if row in self._found_bad:
            return
        self._found_bad.add(row)
        place = self.place(row)
        self._bad_rows.append(UnusableRow(*place, reason))
        if self._named[place.dataset] < _NAMED_ROWS:
            self.tell_bad_rows()


def _image_tokens(stream: GroupStream, kind: str, width: int, height: int, sharing: int) -> tuple[int, int, int]:
    layout = stream.options.layout
    if kind == VIT:
        transform, stride, most = stream.vit_transform, layout.vit_patch_size, layout.vit_max_num_patch_per_side
    else:
        transform, stride, most = stream.vae_transform, layout.latent_stride, layout.max_latent_size
    assert transform is not None, "a kind's transforms cover what its source arranges"
    width, height = transform.size(width, height, sharing)
    rows, columns = height // stride, width // stride
    if max(rows, columns) > most and not layout.interpolate_pos:  # which spreads any grid over the table
        limit = "vit_max_num_patch_per_side" if kind == VIT else "max_latent_size"
        raise BadRow(f"an image of {width} x {height} pixels after the resize exceeds {limit} {most}")
    return rows * columns, height, width
