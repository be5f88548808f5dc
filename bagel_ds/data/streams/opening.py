"""From a dataset config to the streams that the planner draws from.

Guarantees: every file is indexed before one of its rows is planned. Groups without a loss under the modality switches
are dropped with one line. Every returned stream has at least one usable row in each of its datasets; otherwise a
`UserError` lists all faults.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bagel_ds.config_files import read_json
from bagel_ds.data.config.dataset_config import DatasetConfig, GroupConfig
from bagel_ds.data.config.dataset_entry import DatasetEntry
from bagel_ds.data.files.filesystems import shown
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.data.formats.source import CE, MSE, Source
from bagel_ds.data.index.index import DataFile, DataIndex, FileIndex
from bagel_ds.data.plan.planner import PROBED_ROWS, order_of_need
from bagel_ds.data.streams.stream import FileUse, GroupStream, SampleOptions
from bagel_ds.errors import UserError, all_faults
from bagel_ds.model_folder.tokenizer import Tokenizer

logger = logging.getLogger("bagel_ds")

AT_ONCE_ROWS = 200_000  # where there are more, a run begins with the files of its first rows
FIRST_ROWS = 8192  # of each group, some windows of the shuffle


def open_streams(
    config: DatasetConfig,
    tokenizer: Tokenizer,
    options: SampleOptions,
    cache_dir: str | None = None,
    progress: bool = False,
    cursors: dict[str, Any] | None = None,
) -> list[GroupStream]:
    """One stream per usable group, in the config's order; files that are not indexed yet are indexed.

    With many rows, only the files of the first rows from `cursors` (of a saved state's block) on are indexed here. Each
    other file is indexed when its first row is asked for (`files_ahead` gives the order); the rows are the same.
    `cache_dir` keeps the index (default: beside the data, else ~/.cache/bagel_ds). Raises `UserError`.
    """
    index, streams = _open(config, tokenizer, options, cache_dir, progress)
    index.complete(_first_files(index, streams, options.seed, cursors))
    for stream in streams:
        _report(stream)
    faults = [fault for stream in streams for fault in unusable_datasets(stream)]
    all_faults(faults, f"{config.path} names data that cannot be used:")
    return streams


def files_ahead(
    streams: Sequence[GroupStream], seed: int, cursors: dict[str, Any] | None = None, rows: float = math.inf
) -> list[DataFile]:
    """Files that are not indexed yet, in the order in which a run needs them, for at most `rows` rows.

    Rows count at the pace of a group of weight 1, see `plan.order_of_need`.
    """
    ahead: dict[DataFile, None] = {}
    for before, group, unit in order_of_need(streams, seed, cursors):
        if before >= rows:
            break
        index = streams[group].index_of(unit.start)
        if not index.is_indexed:
            ahead[index.file] = None
    return list(ahead)


def _first_files(
    index: DataIndex, streams: list[GroupStream], seed: int, cursors: dict[str, Any] | None
) -> list[DataFile]:
    """What to index before anything else; the same in every process of a host."""
    missing = index.missing()
    if sum(file_index.rows for file_index in index.indexes.values()) <= AT_ONCE_ROWS:
        return missing
    needed = files_ahead(streams, seed, cursors, FIRST_ROWS)
    # To know that each dataset can be used, and the mean length of samples at the beginning of a run.
    for stream in streams:
        uses = {use.dataset: use for use in reversed(stream.uses) if use.index.rows}
        needed += [use.index.file for use in uses.values() if not use.index.is_indexed]
    needed += files_ahead(streams, seed, None, PROBED_ROWS) if cursors else []
    first = list(dict.fromkeys(needed))
    if first and len(first) < len(missing):
        logger.info(
            "%d of %d files are indexed first, those of the first rows; the others during training",
            *(len(first), len(missing)),
        )
    return first


def files_to_index(config: DatasetConfig) -> list[DataFile]:
    """The files of all groups, each once, whatever the modality switches."""
    return list(
        dict.fromkeys(file for group in config.groups for entry in group.datasets for file in _data_files(group, entry))
    )


def index_streams(
    config: DatasetConfig,
    tokenizer: Tokenizer,
    options: SampleOptions,
    cache_dir: str | None = None,
    progress: bool = False,
    workers: int | None = None,
) -> list[GroupStream]:
    """Streams over a complete index, for reports on rows: a dataset without a usable row is not an error."""
    index, streams = _open(config, tokenizer, options, cache_dir, progress, workers)
    index.complete()
    return streams


def _open(
    config: DatasetConfig,
    tokenizer: Tokenizer,
    options: SampleOptions,
    cache_dir: str | None,
    progress: bool,
    workers: int | None = None,
) -> tuple[DataIndex, list[GroupStream]]:
    groups = _groups_with_loss(config, options)
    all_faults([fault for group in groups for fault in _stride_faults(group, options)], f"{config.path}:")
    files = [[_data_files(group, entry) for entry in group.datasets] for group in groups]
    every = chain.from_iterable(chain.from_iterable(files))
    index = DataIndex(every, tokenizer, cache_dir, progress, workers)
    streams = []
    for number, group in enumerate(groups):
        uses = []
        for entry, data_files in zip(group.datasets, files[number], strict=True):
            found = [index.indexes[file] for file in data_files]
            _compare_parquet_info(group, entry, found)
            uses += [FileUse(entry.name, file_index) for file_index in _repeated(group, entry, found)]
        stream = GroupStream(
            number,
            group.name,
            group.kind,
            _source(group),
            uses,
            (group.vae_transform, group.vit_transform),
            options,
            tokenizer,
            group.weight,
            group.is_mandatory,
        )
        streams.append(stream)
    return index, streams


def _source(group: GroupConfig) -> Source:
    return KINDS[group.kind].with_frames(group.frame_sampler)


def _groups_with_loss(config: DatasetConfig, options: SampleOptions) -> list[GroupConfig]:
    on = {loss for loss, switch in ((CE, options.visual_und), (MSE, options.visual_gen)) if switch}
    switches = f"--visual_und {options.visual_und} --visual_gen {options.visual_gen}"
    kept = []
    for group in config.groups:
        if not KINDS[group.kind].losses & on:
            logger.info("group %s is dropped: nothing in it has a loss with %s", group.name, switches)
        elif group.weight == 0 and not group.is_mandatory:
            logger.info("group %s is dropped: its weight is 0 and it is not mandatory", group.name)
        else:
            kept.append(group)
    if not kept:
        raise UserError(
            f"{config.path} leaves no data to train on with {switches}: none of the groups"
            f" {', '.join(group.name for group in config.groups)} has a loss. Change the switches or add data."
        )
    return kept


def _stride_faults(group: GroupConfig, options: SampleOptions) -> list[str]:
    faults, layout = [], options.layout
    sides = (("VAE", group.vae_transform, layout.latent_stride), ("ViT", group.vit_transform, layout.vit_patch_size))
    for name, transform, stride in sides:
        if transform is not None and transform.image_stride % stride:
            faults.append(
                f"group {group.name!r}: image_stride of the {name} transform is {transform.image_stride};"
                f" it must be a multiple of {stride} pixels, the side of a {name} token."
            )
    return faults


def _data_files(group: GroupConfig, entry: DatasetEntry) -> list[DataFile]:
    source = _source(group)
    if not source.jsonl:
        return [DataFile(path, source) for path in entry.files]
    seed = group.shuffle_seed if group.shuffle_lines and entry.num_used is not None else None
    return [DataFile(path, source, entry.images, entry.num_used, seed) for path in entry.files]


def _repeated(group: GroupConfig, entry: DatasetEntry, found: list[FileIndex]) -> list[FileIndex]:
    """num_used_data of parquet files: the list is repeated, then cut. (Lines were chosen when indexing.)"""
    if entry.num_used is None or KINDS[group.kind].jsonl:
        return found
    return (found * (entry.num_used // len(found) + 1))[: entry.num_used]


def _compare_parquet_info(group: GroupConfig, entry: DatasetEntry, found: Sequence[FileIndex]) -> None:
    """Log where parquet_info contradicts the files' own footers, which are what counts."""
    if entry.parquet_info is None:
        return
    where = f"dataset {group.name}/{entry.name}: parquet_info {shown(entry.parquet_info)}"
    try:
        info = read_json(Path(entry.parquet_info)).content
    except UserError as error:
        logger.warning("%s cannot be read (%s); the files' own footers are used", where, error)
        return
    stated = _stated_groups(info, [index.path for index in found])
    unknown = [path for path, groups in stated.items() if groups is None]
    differing = [index.path for index in found if stated[index.path] not in (None, len(index.layout.unit_rows))]
    if unknown:
        logger.info(
            "%s says nothing on %d of %d files (%s); their own footers are used",
            *(where, len(unknown), len(found), shown(unknown[0])),
        )
    if differing:
        logger.warning(
            "%s disagrees with %d of %d files (%s); their own footers are used",
            *(where, len(differing), len(found), shown(differing[0])),
        )


def _stated_groups(info: Any, paths: Sequence[str]) -> dict[str, int | None]:
    """num_row_groups of each file by its path, else by its name, else, for a single file, the only number there is."""
    entries = info if isinstance(info, dict) else {}
    by_name = {os.path.basename(str(key)): value for key, value in entries.items()}
    only = info if len(paths) == 1 else None
    stated: dict[str, int | None] = {}
    for path in paths:
        entry = entries.get(path, by_name.get(os.path.basename(path), only))
        groups = entry.get("num_row_groups") if isinstance(entry, dict) else None
        stated[path] = groups if isinstance(groups, int) else None
    return stated


def unusable_datasets(stream: GroupStream) -> list[str]:
    """A message for each dataset of the stream that has no usable row."""
    faults = []
    for dataset in stream.datasets:
        rows = stream.rows_of(dataset)
        if any(stream.plan_sample(row, 0) is not None for part in rows for row in part):
            continue
        uses = [use for use in stream.uses if use.dataset == dataset]
        files = ", ".join(dict.fromkeys(shown(use.index.path) for use in uses))
        text = f"dataset {stream.name}/{dataset}: none of its {sum(map(len, rows))} rows can be used ({files[:300]})."
        long = sum(row in stream.too_long for part in rows for row in part)
        if long:
            limit = stream.options.max_num_tokens_per_sample
            text += f" {long} are longer than max_num_tokens_per_sample={limit}; raise it or shrink the images."
        bad = (row for row in stream.unusable if row.place.dataset == dataset)
        text += "".join(f" {row.place}: {row.reason}." for row in islice(bad, 3))
        faults.append(text)
    return faults


def _report(stream: GroupStream) -> None:
    logger.info(
        "data group %s: %d rows of %s, read in %d pieces (row groups of parquet files, blocks of lines)",
        *(stream.name, stream.rows, ", ".join(stream.datasets), len(stream.units)),
    )
    stream.unusable.counts()  # which names the first ones
