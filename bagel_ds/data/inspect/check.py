"""`bagel-ds check`: reads every row once, decodes every picture and names what is wrong.

Guarantees: each unusable row is listed once, whatever num_used_data repeats, with file, row group, row and reason; what
counts as usable, and every token count, is what training's own plan says (first epoch, before dropout). Bad rows never
raise. What is read now counts: an index that says something else is repaired. Data files are not changed.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from bagel_ds.data.formats.record import UNUSED_IMAGE, UNUSED_TEXT, Note, ParsedRow, reason_of
from bagel_ds.data.index.data_file import ReadTask, read_tasks
from bagel_ds.data.index.progress import RowProgress
from bagel_ds.data.index.records import WHOLE_FILE, Chunk, TaskIndexer
from bagel_ds.data.samples.images import hidden_damage, ignored_orientation
from bagel_ds.data.samples.sample import TEXT, VIT
from bagel_ds.data.samples.video import Video, decode_frames
from bagel_ds.data.streams.reader import RowPlace, UnusableRow
from bagel_ds.data.streams.stream import FileUse, GroupStream
from bagel_ds.model_folder.tokenizer import Tokenizer
from bagel_ds.processes import in_order

_POOL_ROWS = 500  # below this, starting processes costs more than it saves
_FRAMES = 16  # of a video, so many frames and the last one are decoded, evenly spread
TEXTS, SEEN, GIVEN, DRAWN = "text", "vit", "vae_condition", "vae_target"  # kinds of tokens
# Kinds of notes about rows: the index was wrong about them, or they are used although ...
OUTDATED, SPECIAL, DAMAGED, TURNED = "outdated_index", "special_token_rows", "damaged_images", "turned_images"
NOTES = (SPECIAL, DAMAGED, TURNED, UNUSED_IMAGE, UNUSED_TEXT, OUTDATED)


@dataclass
class DatasetCheck:
    """What one dataset of a group holds. Token counts without the markers around each piece; image sizes in pixels."""

    group: str
    dataset: str
    kind: str
    files: int = 0
    rows: int = 0
    usable: int = 0
    too_long: int = 0  # of the unusable ones: longer than max_num_tokens_per_sample
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys((TEXTS, SEEN, GIVEN, DRAWN), 0))
    lengths: array[int] = field(default_factory=lambda: array("q"))  # tokens of each usable sample, markers included
    widths: array[int] = field(default_factory=lambda: array("q"))  # of each image of a usable row, as stored
    heights: array[int] = field(default_factory=lambda: array("q"))
    unusable: list[UnusableRow] = field(default_factory=list)
    notes: dict[str, list[UnusableRow]] = field(default_factory=lambda: {kind: [] for kind in NOTES})


class _Found(NamedTuple):
    """What reading a task found: its index; (row in the task, reason or note) of what decoding and parsing showed."""

    chunk: Chunk
    undecodable: list[tuple[int, str]]
    notes: list[tuple[int, Note]]


def check_streams(
    streams: Sequence[GroupStream], tokenizer: Tokenizer, workers: int | None = None, progress: bool = False
) -> list[DatasetCheck]:
    """Read and decode every row of `streams`; one result per dataset, in their order.

    `workers` defaults to the CPUs this process may use. Raises `UserError` where a data file changes meanwhile.
    """
    uses = [(stream, use, start) for stream in streams for use, start in _each_file_once(stream)]
    tasks = [list(read_tasks(use.index.file, use.index.layout)) for _, use, _ in uses]
    total = sum(use.index.rows for _, use, _ in uses)
    results = {(s.name, dataset): DatasetCheck(s.name, dataset, s.kind) for s in streams for dataset in s.datasets}
    reports = _run([task for of_file in tasks for task in of_file], total, tokenizer, workers)
    with RowProgress(total, "checking", progress) as bar, closing(reports):
        for (stream, use, start), of_file in zip(uses, tasks, strict=True):
            found = []
            for report in islice(reports, len(of_file)):
                found.append(report)
                bar.update(len(report.chunk.lengths))
            _add_file(results[stream.name, use.dataset], stream, use, start, found)
    return list(results.values())


def _each_file_once(stream: GroupStream) -> Iterator[tuple[FileUse, int]]:
    """Each file of each dataset with its first row in the stream: the first of its uses."""
    first = 0
    seen = set()
    for use in stream.uses:
        if (use.dataset, use.index.path) not in seen:
            seen.add((use.dataset, use.index.path))
            yield use, first
        first += use.index.rows


def _run(tasks: list[ReadTask], rows: int, tokenizer: Tokenizer, workers: int | None) -> Generator[_Found]:
    """Results in the order of `tasks`."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if rows < _POOL_ROWS or workers < 2:
        yield from (_read(tokenizer, task) for task in tasks)
        return
    yield from in_order(_read, tokenizer, tasks, workers, "checking process", ReadTask.reading)


def _read(tokenizer: Tokenizer, task: ReadTask) -> _Found:
    indexer = TaskIndexer(task, tokenizer)
    undecodable, notes = list[tuple[int, str]](), list[tuple[int, Note]]()
    for row, parsed in enumerate(indexer.rows()):
        if isinstance(parsed, str):  # the chunk says why
            continue
        try:
            notes += [(row, note) for note in (*parsed.notes, *_special(parsed, tokenizer), *_decode(parsed))]
        except Exception as error:  # what decoders raise on damaged bodies is an open set
            undecodable.append((row, reason_of(error)))
    return _Found(indexer.chunk(), undecodable, notes)


def _special(parsed: ParsedRow, tokenizer: Tokenizer) -> Iterator[Note]:
    strings = [text for text in tokenizer.special_strings if any(text in held for held in parsed.texts)]
    if strings:
        yield Note(SPECIAL, f"a text holds {' '.join(strings)}, which becomes special tokens")


def _decode(parsed: ParsedRow) -> Iterator[Note]:
    """Decode every image, and frames of every video; notes on those that are used with a flaw. Raises `BadRow`."""
    for number, image in enumerate(parsed.images):
        if isinstance(image, Video):
            last = image.frames - 1
            decode_frames(image, sorted({last * step // _FRAMES for step in range(_FRAMES + 1)}))
            continue
        if damage := hidden_damage(image):
            yield Note(DAMAGED, f"image {number} is damaged and used as far as it goes: {damage}")
        if (orientation := ignored_orientation(image)) > 1:
            yield Note(TURNED, f"image {number} has EXIF orientation {orientation}, which is not applied")


def _add_file(result: DatasetCheck, stream: GroupStream, use: FileUse, start: int, found: list[_Found]) -> None:
    """Add one file, whose rows begin at row `start` of the stream, to its dataset's result."""
    outdated = use.index.repair([report.chunk for report in found])
    unusable, notes, first = dict(use.index.bad), list[tuple[int, Note]](), 0
    for report in found:
        unusable |= {first + row: reason for row, reason in report.undecodable}
        notes += [(first + row, note) for row, note in report.notes]
        first += len(report.chunk.lengths)
    usable = (row for row in range(use.index.rows) if row not in unusable)
    refused = [row for row in usable if not _add_sample(result, stream, use, start, row)]
    unusable |= _why_refused(stream, start, refused)
    result.too_long += sum(start + row in stream.too_long for row in refused)
    result.files += 1
    result.rows += use.index.rows
    result.unusable += [_at(stream, use, start, row, reason) for row, reason in sorted(unusable.items())]
    for row in outdated:
        text = "the index said something else about it and is repaired"
        result.notes[OUTDATED].append(_at(stream, use, start, row, text))
    for row, note in notes:
        if row not in unusable:
            result.notes[note.kind].append(_at(stream, use, start, row, note.text))


def _add_sample(result: DatasetCheck, stream: GroupStream, use: FileUse, start: int, row: int) -> bool:
    """Count the sample of a row in the first epoch; False where there is none."""
    plan = stream.plan_sample(start + row, 0)
    if plan is None:
        return False
    result.usable += 1
    result.lengths.append(sum(entry.tokens + 2 for entry in plan.entries))
    for entry in plan.entries:
        kind = TEXTS if entry.kind == TEXT else SEEN if entry.kind == VIT else DRAWN if entry.loss else GIVEN
        result.tokens[kind] += entry.tokens
    record = use.index.records.record(row)
    assert record is not None
    for width, height in record.image_sizes:
        result.widths.append(width)
        result.heights.append(height)
    return True


def _why_refused(stream: GroupStream, start: int, rows: list[int]) -> dict[int, str]:
    """Reasons of rows that planning has refused."""
    reasons = {bad.place: bad.reason for bad in stream.bad_rows} if rows else {}
    limit = stream.options.max_num_tokens_per_sample
    return {
        row: f"the sample is longer than max_num_tokens_per_sample {limit}"
        if start + row in stream.too_long
        else reasons[stream.place(start + row)]
        for row in rows
    }


def _at(stream: GroupStream, use: FileUse, start: int, row: int, reason: str) -> UnusableRow:
    place = stream.place(start + row) if row != WHOLE_FILE else RowPlace(use.dataset, use.index.path, -1, -1)
    return UnusableRow(place, reason)
