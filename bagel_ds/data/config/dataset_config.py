"""Dataset configs: which files, how often, through which image transform.

Guarantees: both dialects (groups with `dataset_names`; `data_weights` + `data_names`) come out as one `DatasetConfig`
whose files exist. Whatever the YAML holds, the only exception is a `UserError` that lists every fault with its line.
Looks at names of files only; `data/index` reads them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_ds.config_files import Document, KeyPath, merge_or_remove, read_yaml
from bagel_ds.data.config.dataset_entry import DatasetEntry, EntryReader
from bagel_ds.data.config.dataset_info import DatasetInfo, find_dataset_info, read_dataset_info
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.video import FrameSampler
from bagel_ds.errors import UserError, all_faults, nearest, shown

logger = logging.getLogger("bagel_ds")


@dataclass(frozen=True)
class GroupConfig:
    """Datasets of one kind that share transforms and a sampling weight; `kind` is a key of `formats.registry.KINDS`."""

    name: str
    kind: str
    datasets: tuple[DatasetEntry, ...]
    vae_transform: ImageTransform | None
    vit_transform: ImageTransform | None
    weight: float = 1.0
    is_mandatory: bool = False
    shuffle_lines: bool = False
    shuffle_seed: int = 0
    frame_sampler: FrameSampler = FrameSampler()


@dataclass(frozen=True)
class DatasetConfig:
    """A whole dataset config; `path` is the file it came from."""

    groups: tuple[GroupConfig, ...]
    path: str


_GROUP_KEYS = (
    *("dataset_names", "image_transform_args", "vit_image_transform_args", "frame_sampler_args", "is_mandatory"),
    *("num_used_data", "weight", "shuffle_lines", "shuffle_seed", "resume_data_status", "kind"),
)
_ANCHORS = "x-"  # how keys begin that only hold what others merge (<<)
_LARGEST = 2**31 - 1  # of any integer here
_MOST_FILES = 1_000_000  # of num_used_data, where it repeats a list of parquet files
_B_KEYS = ("data_weights", "data_names")


def load_dataset_config(dataset_config_file: str, dataset_info: str | None = None) -> DatasetConfig:
    """Read a dataset config of either dialect.

    `dataset_info` names the file that lists the datasets; by default dataset_info.{yaml,json,py} beside the config, in
    its parent folder, or in ./data/. Raises `UserError` with every fault found.
    """
    path = Path(dataset_config_file)
    document = _read_config(path)
    info = read_dataset_info(Path(dataset_info) if dataset_info else find_dataset_info(path))
    reader = _Reader(document, info)
    content = reader.as_dialect_a() if reader.is_dialect_b else document.content
    groups = [reader.group(name, value) for name, value in content.items() if str(name)[:2] != _ANCHORS]
    used = [group for group in groups if group is not None and group.datasets]
    if not reader.faults and not used:
        reader.faults.append(f"{path} uses no data: list at least one dataset with num_used_data above 0.")
    if not reader.faults and not any(group.weight > 0 or group.is_mandatory for group in used):
        reader.faults.append(f"{path}: every group has weight 0 and none is mandatory; give at least one a weight.")
    all_faults(reader.faults, f"{path} cannot be used:")
    return DatasetConfig(tuple(used), str(path))


def _read_config(path: Path) -> Document:
    if not os.path.lexists(path):
        found = sorted(str(other) for other in path.parent.glob("*.yaml"))
        hint = f"; in that folder: {', '.join(found)}" if found else ""
        raise UserError(
            f"--dataset_config_file: {path} does not exist{hint}. Give the path of a dataset config (YAML)."
        )
    document = read_yaml(path, _remedy_for_twice)
    if not isinstance(document.content, dict) or not document.content:
        raise UserError(f"{path}: expected groups of datasets (see docs/data.md), found {shown(document.content)}.")
    return document


def _remedy_for_twice(path: KeyPath) -> str:
    """Two groups of one kind are natural to want, and the key of a group is its kind unless it says otherwise."""
    if len(path) == 1 and path[0] not in _B_KEYS:
        kind = path[0] if path[0] in KINDS else "..."
        return f"give one of the two groups a name of its own, and write `kind: {kind}` in it (docs/data.md)"
    if len(path) == 2 and path[0] in _B_KEYS:
        return (
            "list the datasets of both under one key; for weights of their own, write two groups of dialect A with "
            f"names of their own and `kind: {path[1]}` (docs/data.md)"
        )
    return merge_or_remove(path)


class _Reader:
    """Reads groups and collects faults; a fault gives None, so that the next group is still checked."""

    def __init__(self, document: Document, info: DatasetInfo) -> None:
        self.document = document
        self.info = info
        self.is_dialect_b = any(key in document.content for key in _B_KEYS)
        self.faults: list[str] = []

    def fault(self, text: str, *keys: Hashable) -> None:
        """A fault at the key `keys`, the first of which is the name of a group."""
        where = self.document.where(*(("data_names", *keys[:1]) if self.is_dialect_b else keys))
        self.faults.append(f"{where}: {text}")

    def as_dialect_a(self) -> dict[str, Any]:
        """Dialect B says only weights and names; the rest has the published values."""
        content = self.document.content
        for key in content:
            if key not in _B_KEYS:
                self.faults.append(f"{self.document.where(key)}: unknown key {shown(key)}; {nearest(key, _B_KEYS)}")
        weights, names = content.get("data_weights") or {}, content.get("data_names") or {}
        for key, value in (("data_weights", weights), ("data_names", names)):
            if not isinstance(value, Mapping):
                self.faults.append(f"{self.document.where(key)}: {key} must map group names, found {shown(value)}")
                return {}
        for group in weights:
            if group not in names:
                text = f"data_weights names the group {shown(group)}, which data_names lacks; {nearest(group, names)}"
                self.faults.append(f"{self.document.where('data_weights', group)}: {text}")
        return {group: {"dataset_names": names[group], "weight": weights.get(group, 1.0)} for group in names}

    def group(self, name: Any, value: Any) -> GroupConfig | None:
        before = len(self.faults)
        if not isinstance(name, str):
            self.fault(f"the name of a group must be text, found {shown(name)}", name)
            return None
        if not isinstance(value, Mapping):
            self.fault(f"group {name!r} must be a mapping with dataset_names, found {shown(value)}", name)
            return None
        for key in value:
            if key not in _GROUP_KEYS:
                self.fault(f"group {name!r} has the unknown key {shown(key)}; {nearest(key, _GROUP_KEYS)}", name, key)
        kind = self._kind(name, value.get("kind"))
        if kind is None:
            return None
        source = KINDS[kind]
        vae, vit = source.vae_transform, source.vit_transform
        if vae is None:
            vit = self._transform(name, value, "image_transform_args", vit)
        else:
            vae = self._transform(name, value, "image_transform_args", vae)
            vit = None if vit is None else self._transform(name, value, "vit_image_transform_args", vit)
        if value.get("vit_image_transform_args") and None in (source.vae_transform, source.vit_transform):
            self.fault(
                f"group {name!r}: vit_image_transform_args has no meaning for the kind {kind}, whose images come in one"
                " size, that of image_transform_args; remove it",
                *(name, "vit_image_transform_args"),
            )
        datasets = self._datasets(name, kind, value)
        sampler = FrameSampler(**self._numbers(name, "frame_sampler_args", value, ("max_num_frames", "min_num_frames")))
        if not 1 <= sampler.min_num_frames <= sampler.max_num_frames:
            self.fault(
                f"group {name!r}: frame_sampler_args needs 1 <= min_num_frames <= max_num_frames, found"
                f" {sampler.min_num_frames} and {sampler.max_num_frames}",
                *(name, "frame_sampler_args"),
            )
        group = GroupConfig(
            name=name,
            kind=kind,
            datasets=datasets,
            vae_transform=vae,
            vit_transform=vit,
            weight=self._weight(name, value.get("weight", 1.0)),
            is_mandatory=self._flag(name, value, "is_mandatory"),
            shuffle_lines=self._flag(name, value, "shuffle_lines"),
            shuffle_seed=self._integer(name, value, "shuffle_seed"),
            frame_sampler=sampler,
        )
        return group if len(self.faults) == before else None

    def _kind(self, name: str, given: Any) -> str | None:
        kind = given if given is not None else self.info.kinds.get(name, name)
        if isinstance(kind, str) and kind in KINDS:
            return kind
        self.fault(f"group {name!r} is of the unknown kind {shown(kind)}; {nearest(kind, KINDS)}", name, "kind")
        return None

    def _weight(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
            self.fault(f"group {name!r}: weight must be a number of at least 0, found {shown(value)}", name, "weight")
            return 0.0
        return float(value)

    def _flag(self, name: str, value: Mapping[str, Any], key: str) -> bool:
        flag = value.get(key, False)
        if not isinstance(flag, bool):
            self.fault(f"group {name!r}: {key} must be true or false, found {shown(flag)}", name, key)
        return flag is True

    def _integer(self, name: str, value: Mapping[str, Any], key: str) -> int:
        number = value.get(key, 0)
        if not _is_integer(number):
            self.fault(f"group {name!r}: {key} must be an integer, found {shown(number)}", name, key)
            return 0
        return int(number)

    def _numbers(self, name: str, key: str, value: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, int]:
        """The mapping under `key` with integer values under known names; {} when it is absent."""
        given = value.get(key)
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self.fault(f"group {name!r}: {key} must be a mapping, found {shown(given)}", name, key)
            return {}
        numbers = {}
        for inner, number in given.items():
            if inner not in known:
                unknown = f"group {name!r}: {key} has the unknown key {shown(inner)}; {nearest(inner, known)}"
                self.fault(unknown, name, key, inner)
            elif not _is_integer(number):
                self.fault(f"group {name!r}: {key}.{inner} must be an integer, found {shown(number)}", name, key, inner)
            else:
                numbers[inner] = int(number)
        return numbers

    def _transform(
        self, name: str, value: Mapping[str, Any], key: str, published: ImageTransform | None
    ) -> ImageTransform | None:
        names = ("image_stride", "max_image_size", "min_image_size", "max_pixels")
        given = self._numbers(name, key, value, names)
        if not given:
            return published
        missing = [inner for inner in names[:3] if inner not in given]
        wrong = [inner for inner, number in given.items() if number < 1]
        if missing or wrong:
            text = f"lacks {', '.join(missing)}" if missing else f"needs positive numbers for {', '.join(wrong)}"
            self.fault(f"group {name!r}: {key} {text}", name, key)
            return None
        return ImageTransform(**given)

    def _datasets(self, group: str, kind: str, value: Mapping[str, Any]) -> tuple[DatasetEntry, ...]:
        names = value.get("dataset_names")
        if not isinstance(names, list) or not names:
            self.fault(f"group {group!r} needs dataset_names, a list of datasets, found {shown(names)}", group)
            return ()
        used = value.get("num_used_data")
        used = [used] * len(names) if used is None or _is_integer(used) else used
        if not isinstance(used, list) or len(used) != len(names):
            expected = f"num_used_data must list one number for each of {len(names)} dataset_names"
            self.fault(f"group {group!r}: {expected}", group, "num_used_data")
            return ()
        most = _LARGEST if KINDS[kind].jsonl else _MOST_FILES
        entries = []
        for place, (item, number) in enumerate(zip(names, used, strict=True)):
            if number is not None and (not _is_integer(number) or not 0 <= number <= most):
                expected = f"num_used_data must hold integers of at least 0 and at most {most:,}, found {shown(number)}"
                self.fault(f"group {group!r}: {expected}", group, "num_used_data")
                continue
            entry = self._dataset(group, kind, item, number, place)
            if entry is not None and number == 0:
                logger.info("dataset %s/%s: num_used_data is 0, so it is not used", group, entry.name)
            elif entry is not None:
                entries.append(entry)
        return tuple(entries)

    def _dataset(self, group: str, kind: str, item: Any, num_used: int | None, place: int) -> DatasetEntry | None:
        inline = isinstance(item, Mapping)  # the paths are given right here
        given = item.get("name") if inline else item
        if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
            expected = "a dataset with its paths in dataset_names needs a `name`" if inline else "a name must be text"
            self.fault(f"group {group!r}: {expected}, found {shown(given)}", group, "dataset_names", place)
            return None
        name = shown(given) if isinstance(given, int) else given
        if inline:
            values = {key: value for key, value in item.items() if key != "name"}
            where, folder = self.document.where(group, "dataset_names", place, "name"), self.document.path.parent
        else:
            folder = Path(self.info.path or ".").parent
            section = next((key for key in (group, kind) if name in self.info.datasets.get(key, {})), None)
            if section is None:
                self.faults.append(self._unknown_dataset(group, name))
                return None
            values, where = self.info.datasets[section][name], self.info.where(section, name)
        entry = EntryReader(f"{where}: dataset {group}/{name}", folder, self.faults)
        return entry.read(name, KINDS[kind].jsonl, values, num_used)

    def _unknown_dataset(self, group: str, name: str) -> str:
        where = self.document.where(*(("data_names", group) if self.is_dialect_b else (group, "dataset_names")))
        if self.info.path is None:
            return f"{where}: dataset {group}/{name} is not known: {self.info.searched}"
        found = self.info.datasets
        if group not in found:
            return f"{where}: {self.info.path} has no datasets for group {group!r}; {nearest(group, found)}"
        return f"{where}: {self.info.path} has no dataset {shown(name)} in {group!r}; {nearest(name, found[group])}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
