"""`bagel-ds check`: every row read once, every picture decoded, what is wrong named.

Guarantees: each unusable row is listed once, whatever num_used_data repeats, with file, row group, row and reason; what
counts as usable, and every token count, is what training's own plan says (first epoch, before dropout). Nothing about
a row is fatal. Reports on data; changes none.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFile

from bagel_ds.data.formats.record import ParsedRow, reason_of
from bagel_ds.data.index.data_file import ReadTask, parsed_rows, read_tasks
from bagel_ds.data.index.progress import RowProgress
from bagel_ds.data.samples.images import BadImage, decode_rgb
from bagel_ds.data.samples.sample import TEXT, VIT
from bagel_ds.data.samples.video import Video, decode_frames
from bagel_ds.data.streams.reader import RowPlace, UnusableRow
from bagel_ds.data.streams.stream import FileUse, GroupStream
from bagel_ds.processes import in_order

_POOL_ROWS = 500  # below this, starting processes costs more than it saves
_FRAMES = 16  # of a video, so many frames and the last one are decoded, evenly spread
TEXTS, SEEN, GIVEN, DRAWN = "text", "vit", "vae_condition", "vae_target"  # kinds of tokens


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
    special: list[UnusableRow] = field(default_factory=list)  # used, although a text holds special-token strings
    damaged: list[UnusableRow] = field(default_factory=list)  # used, although an image is cut off


class _Issues(NamedTuple):
    """What reading a run of rows found, as (row in the run, what)."""

    rows: int
    unreadable: list[tuple[int, str]]
    special: list[tuple[int, str]]
    damaged: list[tuple[int, str]]


def check_streams(
    streams: Sequence[GroupStream], special: Sequence[str], workers: int | None = None, progress: bool = False
) -> list[DatasetCheck]:
    """Read and decode every row of `streams`; one result per dataset, in their order.

    `special` are the strings that the tokenizer takes for special tokens wherever they stand. `workers` defaults to the
    CPUs this process may use.
    """
    uses = [(stream, use, start) for stream in streams for use, start in _each_file_once(stream)]
    indexes = [use.index for _, use, _ in uses]
    tasks = [(n, task) for n, index in enumerate(indexes) for task in read_tasks(index.file, index.layout)]
    total = sum(index.rows for index in indexes)
    found: list[list[_Issues]] = [[] for _ in uses]
    results = {(s.name, dataset): DatasetCheck(s.name, dataset, s.kind) for s in streams for dataset in s.datasets}
    with RowProgress(total, "checking", progress) as bar:
        reports = _run([task for _, task in tasks], total, tuple(special), workers)
        for (number, _), issues in zip(tasks, reports, strict=True):
            found[number].append(issues)
            bar.update(issues.rows)
    for (stream, use, start), issues_of_use in zip(uses, found, strict=True):
        _add_file(results[stream.name, use.dataset], stream, use, start, issues_of_use)
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


def _run(tasks: list[ReadTask], rows: int, special: tuple[str, ...], workers: int | None) -> Iterator[_Issues]:
    """Results in the order of `tasks`."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if rows < _POOL_ROWS or workers < 2:
        yield from (_read(special, task) for task in tasks)
        return
    yield from in_order(_read, special, tasks, workers, "checking process", ReadTask.reading)


def _read(special: tuple[str, ...], task: ReadTask) -> _Issues:
    issues = _Issues(sum(rows for _, rows in task.units), [], [], [])
    for row, parsed in enumerate(parsed_rows(task)):
        if isinstance(parsed, str):
            issues.unreadable.append((row, parsed))
            continue
        strings = [text for text in special if any(text in held for held in parsed.texts)]
        if strings:
            issues.special.append((row, f"a text holds {' '.join(strings)}, which becomes special tokens"))
        try:
            damage = _decode(parsed)
        except Exception as error:  # what decoders raise on damaged bodies is an open set
            issues.unreadable.append((row, reason_of(error)))
            continue
        if damage:
            issues.damaged.append((row, damage))
    return issues


def _decode(parsed: ParsedRow) -> str:
    """Decode every image, and frames of every video; what is damaged but still usable, in words. Raises `BadRow`."""
    damage = ""
    for number, image in enumerate(parsed.images):
        if isinstance(image, Video):
            last = image.frames - 1
            decode_frames(image, sorted({last * part // _FRAMES for part in range(_FRAMES + 1)}))
            continue
        reason = _strict_fault(image)
        if reason:
            decode_rgb(image)
            damage = damage or f"image {number} is damaged and used as far as it goes: {reason}"
    return damage


def _strict_fault(image: bytes | Path) -> str:
    """Why Pillow refuses the image when it may not make do with a part of it; empty when it does not refuse."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        decode_rgb(image)
    except BadImage as error:
        return reason_of(error)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    return ""


def _add_file(result: DatasetCheck, stream: GroupStream, use: FileUse, start: int, found: list[_Issues]) -> None:
    """Add one file, whose rows are `start` and following of the stream, to its dataset's result."""
    unusable, special, damaged = dict(use.index.bad), dict[int, str](), dict[int, str]()
    first = 0
    for issues in found:
        for collected, part in (unusable, issues.unreadable), (special, issues.special), (damaged, issues.damaged):
            for row, reason in part:
                collected.setdefault(first + row, reason)  # the index's reason comes first
        first += issues.rows
    refused = [
        row for row in range(use.index.rows) if row not in unusable and not _add_sample(result, stream, use, start, row)
    ]
    unusable |= _why_refused(stream, start, refused)
    result.too_long += sum(start + row in stream.too_long for row in refused)
    result.files += 1
    result.rows += use.index.rows
    result.unusable += [_at(stream, use, start, row, reason) for row, reason in sorted(unusable.items())]
    for kept, rows in (result.special, special), (result.damaged, damaged):
        kept += [_at(stream, use, start, row, what) for row, what in sorted(rows.items()) if row not in unusable]


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
    reasons = {bad.place: bad.reason for bad in stream.bad_rows}
    limit = stream.options.max_num_tokens_per_sample
    return {
        row: f"the sample is longer than max_num_tokens_per_sample {limit}"
        if start + row in stream.too_long
        else reasons[stream.place(start + row)]
        for row in rows
    }


def _at(stream: GroupStream, use: FileUse, start: int, row: int, reason: str) -> UnusableRow:
    place = stream.place(start + row) if row >= 0 else RowPlace(use.dataset, use.index.path, -1, -1)
    return UnusableRow(place, reason)
