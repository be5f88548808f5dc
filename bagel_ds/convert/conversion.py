"""A conversion from input to dataset YAML: open, convert row by row, write, and say what was done.

Guarantees: rows are converted by threads and written in their order. A rerun with the same input and options continues
after the last complete shard, and changes nothing when it is complete; with others it is refused. What the input says
about pictures elsewhere is not compared: only the table, or the folder of pictures with captions, is.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.config_files import read_json
from bagel_ds.convert import captions, chat, edit
from bagel_ds.convert.columns import Given
from bagel_ds.convert.config import INFO, check_configs, write_configs
from bagel_ds.convert.outputs import (
    BAD_ROWS,
    LINES,
    PROGRESS,
    BadRows,
    Conversations,
    Output,
    ParquetShards,
    Progress,
)
from bagel_ds.convert.tables import (
    ArrowTable,
    CsvTable,
    JsonTable,
    LineTable,
    ParquetTable,
    Row,
    Table,
    table_of_folder,
)
from bagel_ds.data.files.filesystems import Unreadable
from bagel_ds.data.index.progress import RowProgress
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.errors import UserError, disk_fault
from bagel_ds.machine.user_folders import expanded
from bagel_ds.regular_files import file_fault, folder_fault

logger = logging.getLogger("bagel_ds")

Converter = captions.Captions | edit.Edits | chat.Chats
KINDS: dict[str, Callable[[Table, Given], Converter]] = {
    "captions": captions.Captions,
    "edit": edit.Edits,
    "chat": chat.Chats,
}
SCHEMAS = {"captions": captions.SCHEMA, "edit": edit.SCHEMA}
VERSION = 1  # raise it when the same input gives other files
_NAME = re.compile(r"\w[\w .+()-]{0,59}")
_SHOWN = 20  # bad rows in the log; all are in the report


@dataclass(frozen=True)
class Options:
    """A conversion as asked for. Paths may begin with ~."""

    kind: str  # of KINDS
    source: str
    out: str
    name: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    image_folder: str | None = None
    text_extension: str | None = None
    split: str | None = None
    rows_per_file: int = 10_000
    workers: int = 1


class Result(NamedTuple):
    """What a conversion made."""

    config: Path
    bad_rows: Path
    usable: int
    bad: int
    was_done: bool  # before, by an earlier run


def convert(options: Options) -> Result:
    """Convert, or continue. Raises `UserError`, also where no row was usable."""
    source, out = Path(expanded(options.source)), Path(expanded(options.out))
    name = _name(options.name, source)
    try:
        _check_places(source, out, out / name)
        table = _open_table(options, source)
        folder = Path(expanded(options.image_folder)) if options.image_folder else table.folder
        if fault := folder_fault(folder):
            raise UserError(f"--image_folder {folder}: {fault}. Pass the folder that paths of pictures begin in.")
        columns = (options.image_column, options.text_column, options.source_column, options.target_column)
        converter = KINDS[options.kind](table, Given(folder, *columns))
        return _convert(options, source, out, name, table, converter)
    except Unreadable as error:
        raise UserError(f"{source} can't be read: {error}") from None
    except OSError as error:
        raise UserError(f"the conversion stopped: {disk_fault(error, 'pass another --out')}") from error


def _convert(options: Options, source: Path, out: Path, name: str, table: Table, converter: Converter) -> Result:
    folder = out / name
    with _locked(folder):
        check_configs(out, name, is_new=not (folder / PROGRESS).is_file())
        progress = _progress(folder, table.identity(), _compared(options, source))
        was_done = progress.done
        if not was_done:
            with warnings.catch_warnings():  # once for all threads, since it is not safe in them
                warnings.simplefilter("ignore")
                _run(options, folder, table, converter, progress)
        config = write_configs(out, name, converter.source, progress)
    return Result(config, folder / BAD_ROWS, progress.usable, progress.bad, was_done)


def _run(options: Options, folder: Path, table: Table, converter: Converter, progress: Progress) -> None:
    output: Output
    if options.kind == "chat":
        output = Conversations(folder, progress.files.get(LINES, 0))
    else:
        output = ParquetShards(folder, SCHEMAS[options.kind], options.rows_per_file, len(progress.files))
    report = BadRows(folder, progress.bad_bytes)
    if progress.next_row:
        logger.info("continuing after row %d of %d", progress.next_row, table.count)
    number, usable, bad, reasons = progress.next_row, progress.usable, progress.bad, list[str]()

    def save(done: bool) -> None:
        progress.files.update(output.finish())
        progress.bad_bytes = report.finish()
        progress.next_row, progress.usable, progress.bad, progress.done = number, usable, bad, done
        progress.save(folder)

    with closing(output), closing(report), RowProgress(table.count, "convert", shown=True) as shown:
        shown.update(number)
        for row, converted in _converted(table.rows(number, converter.columns), converter, options.workers):
            try:
                if isinstance(converted, BadRow):
                    raise converted
                output.add(converted)
                usable += 1
            except BadRow as fault:
                report.add(number, row.place, str(fault))
                bad += 1
                reasons.append(f"{row.place}: {fault}")
                if len(reasons) <= _SHOWN:
                    logger.warning("bad row: %s", reasons[-1])
                elif len(reasons) == _SHOWN + 1:
                    logger.warning("more bad rows: see %s", report.path)
                    reasons.pop()
            number += 1
            shown.update(1)
            if output.is_full:
                save(done=False)
        if usable:
            save(done=True)
    if not usable:
        why = "; ".join(reasons[:3]) or "it has no rows"
        raise UserError(f"none of the {number} rows of the input could be used: {why}. All reasons: {report.path}")


def _converted(rows: Iterator[Row], converter: Converter, workers: int) -> Iterator[tuple[Row, Any]]:
    """Each row with what became of it, a `BadRow` if nothing, in order; reading and decoding run in threads."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Row, Future[Any]]] = deque()
        for row in rows:
            waiting.append((row._replace(values={}), pool.submit(_attempt, converter, row)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _attempt(converter: Converter, row: Row) -> Any:
    if row.fault:
        return BadRow(row.fault)
    try:
        return converter.convert(row.values)
    except BadRow as fault:
        return fault
    except OSError as error:  # of a picture; what is written is not written here
        return BadRow(f"{error.filename or 'a picture'} can't be read: {error.strerror or error}")


# ------------------------------------------------------------------------------------------------- input and options
def _open_table(options: Options, source: Path) -> Table:
    if not folder_fault(source):
        table = table_of_folder(source, options.split)
        if table is None and options.kind == "captions":
            if options.image_folder is not None:
                raise UserError(f"--image_folder is for tables that name pictures, not for the folder {source}")
            return captions.CaptionFolder(source, options.text_extension or ".txt")
        if table is None:
            raise UserError(
                f"{source} holds no parquet or Arrow files and no metadata.jsonl or metadata.csv; pass a table"
            )
    else:
        if fault := file_fault(source):
            raise UserError(f"{source} can't be read: {fault}. Pass a file or folder that exists.")
        table = _table_of_file(source)
        if options.split is not None:
            raise UserError(f"--split {options.split} has no meaning for {source}, which is one file; leave it out")
    if options.text_extension is not None:
        raise UserError(f"--text_extension is for a folder of pictures with captions beside them, not for {source}")
    return table


def _table_of_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetTable([path], path.parent)
    if suffix == ".arrow":
        return ArrowTable([path], path.parent)
    if suffix in (".csv", ".tsv"):
        return CsvTable(path)
    if suffix in (".jsonl", ".ndjson"):
        return LineTable(path)
    if suffix == ".json":
        try:
            return LineTable(path)  # LLaVA's .json is an array, but others call JSON lines so
        except Unreadable:
            return JsonTable(path)
    raise UserError(
        f"{path}: tables are .jsonl, .json, .csv, .tsv, .parquet and .arrow files, or folders; found {suffix or 'none'}"
    )


def _name(given: str | None, source: Path) -> str:
    """The name of the data set, of the folder of its files and of its YAML."""
    if given is None:
        there = Path(os.path.abspath(source))
        given = re.sub(r"[^\w.+()-]", "_", there.name if there.is_dir() else there.stem).lstrip(".+()-")[:60] or "data"
    elif not _NAME.fullmatch(given):
        raise UserError(f"--name {given!r}: expected up to 60 letters, digits, spaces and _ . + - ( ), a letter first")
    return given if f"{given}.yaml" != INFO else f"{given}_"


def _check_places(source: Path, out: Path, folder: Path) -> None:
    if source.is_dir() and Path(os.path.abspath(out)).resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies in the input {source}; pass a folder outside it")
    if out.exists() and (fault := folder_fault(out)):
        raise UserError(f"--out {out}: {fault}; pass the name of a folder")
    if folder.exists() and (fault := folder_fault(folder)):
        raise UserError(f"{folder}: {fault}, and the data would go there; pass another --name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROGRESS).is_file():
        raise UserError(f"{folder} holds other files; pass another --name or --out, so that nothing is overwritten")


def _compared(options: Options, source: Path) -> dict[str, Any]:
    """What must be the same when a conversion goes on."""
    free = ("source", "out", "name", "workers")
    chosen = {key: value for key, value in asdict(options).items() if key not in free}
    return {"input": os.path.abspath(source), **chosen, "version": VERSION}


def _progress(folder: Path, found: dict[str, Any], options: dict[str, Any]) -> Progress:
    """Where an earlier conversion stopped; a new one where it had no complete shard. Raises `UserError`."""
    path = folder / PROGRESS
    new = Progress(found, options)
    if path.exists():
        try:
            earlier = Progress(**read_json(path).content)
        except TypeError:
            raise UserError(f"{path} is not from this version; pass another --name, or remove {folder}") from None
        if earlier.next_row:
            _check_same(folder, earlier, new)
            return earlier
    new.save(folder)
    return new


def _check_same(folder: Path, earlier: Progress, new: Progress) -> None:
    remedy = f"Pass another --name, or remove {folder} and its YAML to convert again."
    changed = [
        f"{key} was {json.dumps(earlier.options.get(key))}, is {json.dumps(value)}"
        for key, value in new.options.items()
        if earlier.options.get(key) != value
    ]
    if changed:
        raise UserError(f"{folder} was converted with other options ({'; '.join(changed)}). {remedy}")
    if earlier.input != new.input:
        raise UserError(f"{folder} was converted from this input, but it has changed since. {remedy}")
    for name, size in earlier.files.items():
        there = folder / name
        # A jsonl may have lines after the complete ones; they are removed.
        if file_fault(there) or there.stat().st_size < size:
            raise UserError(f"{there} has been removed or cut since it was written. {remedy}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process converts into a folder. A folder that nothing was written to is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is converting into {folder}; wait for it, or pass another --name"
            ) from None
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    finally:
        os.close(descriptor)
