"""Where the files of one dataset lie: the paths of a dataset_info entry, found on disk or at a URI.

Guarantees: what comes out names files that exist; every fault is one line with its place, added to a list that is not
this file's to raise. Looks at names of files only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_ds.data.files import filesystems
from bagel_ds.errors import nearest

logger = logging.getLogger("bagel_ds")

_ENTRY_KEYS = (
    *("data_dir", "num_files", "num_total_samples", "parquet_info_path", "jsonl_path", "json_dir"),
    *("path", "parquet", "parquet_info"),
)


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a group. `files`: parquet files or one jsonl file; `num_used`: files, or lines of the jsonl."""

    name: str
    files: tuple[str, ...]
    image_dir: str = ""
    num_used: int | None = None  # None: everything once
    parquet_info: str | None = None


def type_name(value: Any) -> str:
    """What a message says was found."""
    return "nothing" if value is None else type(value).__name__


class EntryReader:
    """One dataset's paths -> `DatasetEntry`; relative ones are looked up beside the file that gives them, then here."""

    def __init__(self, where: str, folder: Path, faults: list[str]) -> None:
        self.where = where
        self.folder = folder
        self.faults = faults

    def fault(self, text: str) -> None:
        self.faults.append(f"{self.where}: {text}")

    def read(self, name: str, source: str, values: Any, num_used: int | None) -> DatasetEntry | None:
        if not isinstance(values, Mapping):
            self.fault(f"expected a mapping with paths, found {type_name(values)}")
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
