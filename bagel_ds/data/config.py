"""Dataset configs: which files, how often, through which image transform.

Guarantees: both dialects (groups with `dataset_names`; `data_weights` + `data_names`) come out as one `DatasetConfig`
whose files exist; every fault of a config is listed at once. Looks at names of files only; their content is
`index.py`'s work.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bagel_ds.data import filesystems
from bagel_ds.data.dataset_info import DatasetInfo, find_dataset_info, read_dataset_info
from bagel_ds.data.images import ImageTransform
from bagel_ds.data.sources.kinds import KINDS
from bagel_ds.data.video import FrameSampler
from bagel_ds.errors import UserError, all_faults

logger = logging.getLogger("bagel_ds")


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a group. `files`: parquet files or one jsonl file; `num_used`: files, or lines of the jsonl."""

    name: str
    files: tuple[str, ...]
    image_dir: str = ""
    num_used: int | None = None  # None: everything once
    parquet_info: str | None = None


@dataclass(frozen=True)
class GroupConfig:
    """Datasets of one kind that share transforms and a sampling weight; `kind` is a key of `sources.kinds.KINDS`."""

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


# The published values, used where a config gives none (dialect B never does).
_TRANSFORMS: dict[str, tuple[ImageTransform | None, ImageTransform | None]] = {
    "t2i": (ImageTransform(16, 1024, 512), None),
    "edit": (ImageTransform(16, 1024, 512), ImageTransform(14, 518, 224)),
    "vlm": (None, ImageTransform(14, 980, 378, 2_007_040)),
    "interleave": (ImageTransform(16, 512, 512), ImageTransform(14, 512, 512)),
}
_GROUP_KEYS = (
    *("dataset_names", "image_transform_args", "vit_image_transform_args", "frame_sampler_args", "is_mandatory"),
    *("num_used_data", "weight", "shuffle_lines", "shuffle_seed", "resume_data_status", "kind"),
)
_ENTRY_KEYS = (
    *("data_dir", "num_files", "num_total_samples", "parquet_info_path", "jsonl_path", "json_dir"),
    *("path", "parquet", "parquet_info"),
)
_B_KEYS = ("data_weights", "data_names")


def load_dataset_config(dataset_config_file: str, dataset_info: str | None = None) -> DatasetConfig:
    """Read a dataset config of either dialect.

    `dataset_info` names the file that lists the datasets; by default dataset_info.{yaml,json,py} beside the config, in
    its parent folder, or in ./data/. Raises `UserError` with every fault found.
    """
    path = Path(dataset_config_file)
    content = _read_yaml(path)
    info = read_dataset_info(Path(dataset_info) if dataset_info else find_dataset_info(path))
    reader = _Reader(str(path), info)
    if any(key in content for key in _B_KEYS):
        content = reader.as_dialect_a(content)
    groups = [reader.group(name, value) for name, value in content.items()]
    used = [group for group in groups if group is not None and group.datasets]
    if not reader.faults and not used:
        reader.faults.append(f"{path} uses no data: list at least one dataset with num_used_data above 0.")
    if not reader.faults and not any(group.weight > 0 or group.is_mandatory for group in used):
        reader.faults.append(f"{path}: every group has weight 0 and none is mandatory; give at least one a weight.")
    all_faults(reader.faults, f"{path} cannot be used:")
    return DatasetConfig(tuple(used), str(path))


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}."


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(found)}" if found else ""
        raise UserError(
            f"--dataset_config_file: {path} does not exist{hint}. Give the path of a dataset config (YAML)."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected groups of datasets (see docs/data.md), found {_type_name(content)}.")
    return content


class _Reader:
    """Reads groups and collects faults; a fault gives None, so that the next group is still checked."""

    def __init__(self, path: str, info: DatasetInfo) -> None:
        self.path = path
        self.info = info
        self.faults: list[str] = []

    def fault(self, text: str) -> None:
        self.faults.append(f"{self.path}: {text}")

    def as_dialect_a(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Dialect B says only weights and names; the rest has the published values."""
        for key in content:
            if key not in _B_KEYS:
                self.fault(f"unknown key {key!r}; {nearest(key, _B_KEYS)}")
        weights, names = content.get("data_weights") or {}, content.get("data_names") or {}
        for key, value in (("data_weights", weights), ("data_names", names)):
            if not isinstance(value, Mapping):
                self.fault(f"{key} must map group names, found {_type_name(value)}")
                return {}
        for group in weights:
            if group not in names:
                self.fault(f"data_weights names the group {group!r}, which data_names lacks; {nearest(group, names)}")
        return {group: {"dataset_names": names[group], "weight": weights.get(group, 1.0)} for group in names}

    def group(self, name: str, value: Any) -> GroupConfig | None:
        before = len(self.faults)
        if not isinstance(value, Mapping):
            self.fault(f"group {name!r} must be a mapping with dataset_names, found {_type_name(value)}")
            return None
        for key in value:
            if key not in _GROUP_KEYS:
                self.fault(f"group {name!r} has the unknown key {key!r}; {nearest(key, _GROUP_KEYS)}")
        kind = self._kind(name, value.get("kind"))
        if kind is None:
            return None
        source = KINDS[kind].name
        vae, vit = _TRANSFORMS[source]
        if vae is None:
            vit = self._transform(name, value, "image_transform_args", vit)
        else:
            vae = self._transform(name, value, "image_transform_args", vae)
            vit = None if vit is None else self._transform(name, value, "vit_image_transform_args", vit)
        datasets = self._datasets(name, source, value)
        sampler = FrameSampler(**self._numbers(name, "frame_sampler_args", value, ("max_num_frames", "min_num_frames")))
        if not 1 <= sampler.min_num_frames <= sampler.max_num_frames:
            self.fault(
                f"group {name!r}: frame_sampler_args needs 1 <= min_num_frames <= max_num_frames, found"
                f" {sampler.min_num_frames} and {sampler.max_num_frames}"
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
        if kind in KINDS:
            return str(kind)
        self.fault(f"group {name!r} is of the unknown kind {kind!r}; {nearest(str(kind), KINDS)}")
        return None

    def _weight(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            self.fault(f"group {name!r}: weight must be a number of at least 0, found {value!r}")
            return 0.0
        return float(value)

    def _flag(self, name: str, value: Mapping[str, Any], key: str) -> bool:
        flag = value.get(key, False)
        if not isinstance(flag, bool):
            self.fault(f"group {name!r}: {key} must be true or false, found {flag!r}")
        return bool(flag)

    def _integer(self, name: str, value: Mapping[str, Any], key: str) -> int:
        number = value.get(key, 0)
        if not _is_integer(number):
            self.fault(f"group {name!r}: {key} must be an integer, found {number!r}")
            return 0
        return int(number)

    def _numbers(self, name: str, key: str, value: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, int]:
        """The mapping under `key` with integer values under known names; {} when it is absent."""
        given = value.get(key)
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self.fault(f"group {name!r}: {key} must be a mapping, found {_type_name(given)}")
            return {}
        numbers = {}
        for inner, number in given.items():
            if inner not in known:
                self.fault(f"group {name!r}: {key} has the unknown key {inner!r}; {nearest(inner, known)}")
            elif not _is_integer(number):
                self.fault(f"group {name!r}: {key}.{inner} must be an integer, found {number!r}")
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
            self.fault(f"group {name!r}: {key} {text}")
            return None
        return ImageTransform(**given)

    def _datasets(self, group: str, source: str, value: Mapping[str, Any]) -> tuple[DatasetEntry, ...]:
        names = value.get("dataset_names")
        if not isinstance(names, list) or not names:
            self.fault(f"group {group!r} needs dataset_names, a list of datasets, found {_type_name(names)}")
            return ()
        used = value.get("num_used_data")
        used = [used] * len(names) if used is None or _is_integer(used) else used
        if not isinstance(used, list) or len(used) != len(names):
            self.fault(f"group {group!r}: num_used_data must list one number for each of {len(names)} dataset_names")
            return ()
        entries = []
        for item, number in zip(names, used, strict=True):
            if number is not None and (not _is_integer(number) or number < 0):
                self.fault(f"group {group!r}: num_used_data must hold integers of at least 0, found {number!r}")
                continue
            entry = self._dataset(group, source, item, number)
            if entry is not None and number == 0:
                logger.info("dataset %s/%s: num_used_data is 0, so it is not used", group, entry.name)
            elif entry is not None:
                entries.append(entry)
        return tuple(entries)

    def _dataset(self, group: str, source: str, item: Any, num_used: int | None) -> DatasetEntry | None:
        if isinstance(item, Mapping):  # paths given right here
            name, values = str(item.get("name", "")), {key: v for key, v in item.items() if key != "name"}
            where, folder = self.path, Path(self.path).parent
            if not name:
                self.fault(f"group {group!r}: a dataset with its paths in dataset_names needs a `name`")
                return None
        else:
            name, where, folder = str(item), str(self.info.path), Path(self.info.path or ".").parent
            found = self.info.datasets.get(group, {}).get(name)
            if found is None:
                self.fault(self._unknown_dataset(group, name))
                return None
            values = found
        entry = _EntryReader(f"{where}: dataset {group}/{name}", folder, self.faults)
        return entry.read(name, source, values, num_used)

    def _unknown_dataset(self, group: str, name: str) -> str:
        if self.info.path is None:
            return f"dataset {group}/{name} is not known: {self.info.searched}"
        if group not in self.info.datasets:
            return f"{self.info.path} has no datasets for group {group!r}; {nearest(group, self.info.datasets)}"
        return f"{self.info.path} has no dataset {name!r} in {group!r}; {nearest(name, self.info.datasets[group])}"


class _EntryReader:
    """One dataset's paths -> `DatasetEntry`; relative ones are looked up beside the file that gives them, then here."""

    def __init__(self, where: str, folder: Path, faults: list[str]) -> None:
        self.where = where
        self.folder = folder
        self.faults = faults

    def fault(self, text: str) -> None:
        self.faults.append(f"{self.where}: {text}")

    def read(self, name: str, source: str, values: Any, num_used: int | None) -> DatasetEntry | None:
        if not isinstance(values, Mapping):
            self.fault(f"expected a mapping with paths, found {_type_name(values)}")
            return None
        for key in values:
            if key not in _ENTRY_KEYS:
                self.fault(f"unknown key {key!r}; {nearest(key, _ENTRY_KEYS)}")
        uris = [key for key in ("data_dir", "path", "jsonl_path") if filesystems.is_uri(str(values.get(key)))]
        if uris:
            return self._read_remote(name, source, values, num_used, str(values[uris[0]]))
        data_dir = self._path(values, "data_dir") or self._path(values, "path")
        if data_dir is None:
            if not any(values.get(key) for key in ("data_dir", "path")):
                self.fault("data_dir (or path) is missing")
            return None
        if source == "vlm":
            jsonl = self._path(values, "jsonl_path")
            if jsonl is None:
                if not values.get("jsonl_path"):
                    self.fault("jsonl_path is missing")
                return None
            return DatasetEntry(name, (str(jsonl),), str(data_dir), num_used)
        files = self._parquet_files(data_dir, values)
        info = values.get("parquet_info_path") or values.get("parquet_info")
        return DatasetEntry(name, files, "", num_used, self._hint(info, data_dir)) if files else None

    def _read_remote(
        self, name: str, source: str, values: Mapping[str, Any], num_used: int | None, uri: str
    ) -> DatasetEntry | None:
        """A dataset at a URI of `pyarrow.fs`; its parquet_info, if any, is a local file."""
        if source == "vlm":
            self.fault(f"{uri}: data_dir and jsonl_path of conversations must be local paths; copy or mount them")
            return None
        named = values.get("parquet") or []
        try:
            if named:
                names = [str(file) for file in (named if isinstance(named, list) else [named])]
                files = [filesystems.joined(uri, file) for file in names]
                missing = [file for file in files if not filesystems.exists(file)]
                if missing:
                    self.fault(f"no such parquet file: {', '.join(missing)}")
                    return None
            else:
                files = filesystems.parquet_files_in(uri)
        except FileNotFoundError:
            self.fault(f"data_dir does not exist: {uri}. Put the data there or correct the path.")
            return None
        except Exception as error:  # what file systems raise on wrong URIs, hosts and credentials is an open set
            self.fault(f"data_dir {uri} cannot be opened ({type(error).__name__}: {' '.join(str(error).split())})")
            return None
        if not files:
            self.fault(f"{uri} holds no .parquet file")
            return None
        info = values.get("parquet_info_path") or values.get("parquet_info")
        return DatasetEntry(name, tuple(files), "", num_used, self._hint(info, self.folder))

    def _parquet_files(self, data_dir: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
        named = values.get("parquet")
        if named:
            files = [data_dir / str(file) for file in (named if isinstance(named, list) else [named])]
            missing = [str(file) for file in files if not file.is_file()]
            if missing:
                self.fault(f"no such parquet file: {', '.join(missing)}")
                return ()
        elif data_dir.is_file():
            files = [data_dir]
        else:
            found = (file for file in data_dir.glob("*.parquet") if file.name[0] != ".")
            files = sorted(file for file in found if file.is_file())
        if not files:
            self.fault(f"{data_dir} holds no .parquet file")
        return tuple(map(str, files))

    def _path(self, values: Mapping[str, Any], key: str) -> Path | None:
        value = values.get(key)
        if not value:
            return None
        candidates = [self.folder / str(value), Path(str(value))]
        for candidate in candidates:
            if candidate.exists():
                return candidate
        tried = " or ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
        self.fault(f"{key} does not exist: {tried}. Put the data there or correct the path.")
        return None

    def _hint(self, value: Any, data_dir: Path) -> str | None:
        """parquet_info is never needed, the files' own footers say more; so a missing one is worth a line only."""
        if not value:
            return None
        for candidate in (self.folder / str(value), Path(str(value)), data_dir / str(value)):
            if candidate.is_file():
                return str(candidate)
        logger.info("%s: parquet_info %s does not exist; the files' own footers are used", self.where, value)
        return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_name(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
