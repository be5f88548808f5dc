"""GroupStream: a group of datasets as numbered rows that can be planned, described and read.

Guarantees: `plan_sample` needs only the index and counter-based draws; no file is read. A sample's length is exact, and
the same in every process. A row that cannot be used gives None, is counted, and named once. Reading gives each row or
the reason why it cannot be read, never an exception.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import numpy as np

from bagel_ds.data.files import rows
from bagel_ds.data.formats.record import VERSION, ParsedRow, Record, decode_record
from bagel_ds.data.formats.source import Piece, Source
from bagel_ds.data.index.index import FileIndex
from bagel_ds.data.plan.planner import digest_of
from bagel_ds.data.samples.draws import Draws, draw_key
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, BadRow, Entry, SamplePlan
from bagel_ds.data.streams.reader import RowAddress, RowPlace, StreamReader, UnusableRow
from bagel_ds.data.streams.row_sets import RowSet
from bagel_ds.data.streams.unusable import UnusableRows
from bagel_ds.model_folder.tokenizer import Tokenizer

_KNOWN_SIZES = 100_000


@dataclass(frozen=True)
class SampleOptions:
    """What planning a sample depends on, apart from its row; probabilities 0 to 1."""

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


class _Units(Sequence[range]):
    """The read units of all uses as ranges of rows, made from their bounds when they are asked for."""

    def __init__(self, lengths: Sequence[np.ndarray]) -> None:
        self.bounds = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        return range(*self.bounds[number : number + 2].tolist())

    def __iter__(self) -> Iterator[range]:
        return map(range, *(part.tolist() for part in (self.bounds[:-1], self.bounds[1:])))


class GroupStream:
    """See the module. `group` counts the groups of the run, `source` the group's format."""

    def __init__(
        self,
        group: int,
        name: str,
        kind: str,
        source: Source,
        uses: Sequence[FileUse],
        transforms: tuple[ImageTransform | None, ImageTransform | None],
        options: SampleOptions,
        tokenizer: Tokenizer,
        weight: float = 1.0,
        is_mandatory: bool = False,
    ) -> None:
        self.group, self.name, self.kind, self.source = group, name, kind, source
        self.weight, self.is_mandatory = weight, is_mandatory
        self.uses = tuple(uses)
        self.datasets = tuple(dict.fromkeys(use.dataset for use in uses))
        self.vae_transform, self.vit_transform = transforms
        self.options = options
        self.special = tokenizer.special
        self._text_lengths = f"{VERSION} {tokenizer.fingerprint}"
        self.reader = StreamReader(name, source, *transforms)
        self.units = _Units([use.index.layout.unit_rows for use in uses])
        self._starts = list(accumulate((use.index.rows for use in uses), initial=0))  # first row of each use, rows
        self.rows = self._starts.pop()
        self._first_units = list(accumulate((len(use.index.layout.unit_rows) for use in uses), initial=0))
        once: dict[tuple[str, str], int] = {}  # the first row of a file's first use
        self._first_uses = [
            once.setdefault((use.dataset, use.index.path), start) for use, start in zip(self.uses, self._starts)
        ]
        files = [
            (use.dataset, use.index, start)
            for use, start, first in zip(self.uses, self._starts, self._first_uses)
            if start == first
        ]
        self.unusable = UnusableRows(files, self.rows, self.place)
        self._choice_key = draw_key("choice", options.seed, name)
        self._dropout_key = draw_key("dropout", options.seed, name)
        chances = {
            TEXT: options.text_cond_dropout_prob,
            VIT: options.vit_cond_dropout_prob,
            VAE: options.vae_cond_dropout_prob,
        }
        self._chances = chances if self.source.conditions_drop and any(chances.values()) else {}
        self._sizes: dict[tuple[str, int, int, int], tuple[int, int, int]] = {}

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
        return list(self.unusable)

    @property
    def too_long(self) -> RowSet:
        """Rows with a sample longer than max_num_tokens_per_sample, as met so far, each once."""
        return self.unusable.too_long

    def plan_sample(self, row: int, epoch: int) -> SamplePlan | None:
        """The sample of `row` in `epoch`, every choice made; None where there is none (see `unusable`)."""
        number, local = self._use(row)
        numbers = self.uses[number].index.records.numbers_of(local)
        if not numbers:
            return None
        record = decode_record(numbers)
        pieces = self.source.arrange(record, Draws(self._choice_key, epoch, row))
        try:
            entries = self._entries(pieces, record)
        except BadRow as error:
            self.unusable.refuse(self._first_uses[number] + local, str(error))
            return None
        if sum([entry.tokens + 2 for entry in entries]) > self.options.max_num_tokens_per_sample:
            self.unusable.is_too_long(self._first_uses[number] + local)
            return None
        return SamplePlan(self.group, epoch, row, self._with_dropout(entries, epoch, row))

    def place(self, row: int) -> RowPlace:
        """The file, row group and row of a row number."""
        number, local = self._use(row)
        use = self.uses[number]
        places = use.index.layout.places
        if len(places):
            return RowPlace(use.dataset, use.index.path, -1, int(places[local, 2]))
        unit = int(np.searchsorted(self.units.bounds, row, side="right")) - 1
        start = int(self.units.bounds[unit])
        return RowPlace(use.dataset, use.index.path, unit - self._first_units[number], row - start)

    def _use(self, row: int) -> tuple[int, int]:
        """(number of the use, row in its file) of a row number."""
        number = bisect.bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def index_of(self, row: int) -> FileIndex:
        """The index of the file that a row lies in."""
        return self.uses[self._use(row)[0]].index

    def rows_of(self, dataset: str) -> list[range]:
        """Row numbers of one of `datasets`."""
        stops = [*self._starts[1:], self.rows]
        parts = zip(self.uses, self._starts, stops, strict=True)
        return [range(start, stop) for use, start, stop in parts if use.dataset == dataset]

    @property
    def distinct_rows(self) -> list[range]:
        """Row numbers of each file once, even where the configuration uses a file several times."""
        parts = zip(self.uses, self._starts, self._first_uses, strict=True)
        return [range(start, start + use.index.rows) for use, start, first in parts if start == first]

    def address(self, row: int) -> RowAddress:
        """How to read a row in any process."""
        number, local = self._use(row)
        index, place = self.uses[number].index, self.place(row)
        offset = length = 0
        if place.row_group < 0:
            offset, length, _ = index.layout.places[local].tolist()
        return RowAddress(place, index.file.folder, index.layout.columns, offset, length)

    def read(self, plan: SamplePlan) -> ParsedRow | BadRow:
        """The row of `plan` as it is in the file."""
        return self.reader.read(self.address(plan.row))

    def whole_row(self, row: int) -> dict[str, Any]:
        """All columns of a row of the file, also those that training doesn't read. Raises what the libraries raise."""
        place, _, _, offset, length = self.address(row)
        if place.row_group < 0:
            return rows.jsonl_row(place.file, offset, length)
        return rows.parquet_row(place.file, place.row_group, place.row, rows.parquet_columns(place.file))

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
