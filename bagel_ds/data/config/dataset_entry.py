"""Where the files of one dataset lie: the paths of a dataset_info entry, found on disk or at a URI.

Guarantees: every file of a `DatasetEntry` exists and is a regular file; `~` and `$NAME` in local paths stand for what
they do in a shell. Every fault is one line with its place, added to the list of the caller, who raises them together.
Looks at names of files only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_ds.config_files import LONGEST_TEXT
from bagel_ds.data.files import filesystems
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.errors import nearest, shown
from bagel_ds.machine.user_folders import expanded
from bagel_ds.regular_files import file_fault, folder_fault

logger = logging.getLogger("bagel_ds")

_ENTRY_KEYS = (
    *("data_dir", "num_files", "num_total_samples", "parquet_info_path", "jsonl_path", "json_dir"),
    *("path", "parquet", "parquet_info", "linked_dirs"),
)
_LISTED = 5  # missing files that a message names


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a group. `files`: parquet files or one jsonl file; `num_used`: files, or lines of the jsonl."""

    name: str
    files: tuple[str, ...]
    images: ImageFolder = ImageFolder()
    num_used: int | None = None  # None: everything once
    parquet_info: str | None = None


class EntryReader:
    """One dataset's paths -> `DatasetEntry`; relative ones are looked up beside the file that gives them, then here."""

    def __init__(self, where: str, folder: Path, faults: list[str]) -> None:
        self.where = where
        self.folder = folder
        self.faults = faults

    def fault(self, text: str) -> None:
        self.faults.append(f"{self.where}: {text}")

    def read(self, name: str, jsonl: bool, values: Any, num_used: int | None) -> DatasetEntry | None:
        """The dataset that `values` describe, with rows in a jsonl file or in parquet; None, with a fault, if not."""
        if not isinstance(values, Mapping):
            self.fault(f"expected a mapping with paths, found {shown(values)}")
            return None
        before = len(self.faults)
        for key in values:
            if key not in _ENTRY_KEYS:
                self.fault(f"unknown key {shown(key)}; {nearest(key, _ENTRY_KEYS)}")
        data_dir = self._text(values, "data_dir") or self._text(values, "path")
        jsonl_path = self._text(values, "jsonl_path") if jsonl else ""
        if not data_dir and len(self.faults) == before:
            self.fault("data_dir (or path) is missing")
        if jsonl and not jsonl_path and len(self.faults) == before:
            self.fault("jsonl_path is missing")
        if len(self.faults) > before:
            return None
        if jsonl:
            return self._conversations(name, data_dir, jsonl_path, values, num_used)
        folder = self.folder
        if filesystems.is_uri(data_dir):
            files = self._remote_files(data_dir, self._texts(values, "parquet"))
        else:
            found = self._folder("data_dir", data_dir, or_file=True)
            folder = found or self.folder
            files = self._parquet_files(found, self._texts(values, "parquet")) if found else ()
        info = self._text(values, "parquet_info_path") or self._text(values, "parquet_info")
        hint = self._hint(info, folder) if info else None
        return DatasetEntry(name, files, ImageFolder(), num_used, hint) if files else None

    # ------------------------------------------------------------------------------------------------------ values
    def _text(self, values: Mapping[str, Any], key: str) -> str:
        """The path under `key`, `~` and variables expanded unless it is a URI; "" where there is none."""
        texts = self._texts(values, key)
        if len(texts) > 1:
            self.fault(f"{key} must be one path, found {len(texts)}")
        return texts[0] if texts else ""

    def _texts(self, values: Mapping[str, Any], key: str) -> list[str]:
        """The path or the list of paths under `key`."""
        value = values.get(key)
        given = value if isinstance(value, list) else [] if value in (None, "") else [value]
        texts = []
        for item in given:
            text = item if isinstance(item, str) else shown(item)
            if isinstance(item, bool) or not isinstance(item, (str, int)) or not 0 < len(text) <= LONGEST_TEXT:
                self.fault(f"{key} must be text of 1 to {LONGEST_TEXT} characters, found {shown(item)}")
            else:
                texts.append(text if filesystems.is_uri(text) else expanded(text))
        return texts

    # --------------------------------------------------------------------------------------------------- local paths
    def _conversations(
        self, name: str, data_dir: str, jsonl_path: str, values: Mapping[str, Any], num_used: int | None
    ) -> DatasetEntry | None:
        """A jsonl and the folder of its pictures."""
        for uri in filter(filesystems.is_uri, (data_dir, jsonl_path)):
            self.fault(f"{uri}: data_dir and jsonl_path of conversations must be local paths; copy or mount them")
            return None
        folder = self._folder("data_dir", data_dir)
        jsonl = self._found("jsonl_path", jsonl_path)
        if jsonl is not None and (fault := file_fault(jsonl)):
            self.fault(f"jsonl_path {jsonl}: {fault}. Put the data there or correct the path.")
            jsonl = None
        linked = [self._folder("linked_dirs", path) for path in self._texts(values, "linked_dirs")]
        if folder is None or jsonl is None or None in linked:
            return None
        return DatasetEntry(name, (str(jsonl),), ImageFolder(str(folder), tuple(map(str, linked))), num_used)

    def _parquet_files(self, data_dir: Path, named: Sequence[str]) -> tuple[str, ...]:
        """The files that are named, or all of the folder; () with a fault where one can't be opened."""
        files = [data_dir / name for name in named] if named else self._files_in(data_dir)
        faults = [f"{file}: {fault}" for file in files if (fault := file_fault(file))]
        if faults:
            more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
            named_faults = "; ".join(faults[:_LISTED])
            self.fault(f"no such parquet file: {named_faults}{more}. Download or copy it again, or remove the name.")
            return ()
        if not files:
            self.fault(f"{data_dir} holds no .parquet file")
        return tuple(map(str, files))

    def _files_in(self, data_dir: Path) -> list[Path]:
        """What is called `*.parquet` in a folder, also links that lead nowhere; or `data_dir` itself, if a file."""
        if not file_fault(data_dir):
            return [data_dir]
        files = [path for path in sorted(data_dir.glob("*.parquet")) if path.name[0] != "."]
        folders = [path for path in files if not folder_fault(path)]
        for path in folders:
            logger.warning("%s: %s is a folder and is not read; list its files as another dataset", self.where, path)
        return [path for path in files if path not in folders]

    def _folder(self, key: str, value: str, or_file: bool = False) -> Path | None:
        """The folder (or also the file) at `value`; None, with a fault, where there is none."""
        path = self._found(key, value)
        if path is None or not (fault := folder_fault(path)) or (or_file and not file_fault(path)):
            return path
        self.fault(f"{key} {path}: {fault}. Put the data there or correct the path.")
        return None

    def _found(self, key: str, value: str) -> Path | None:
        """Where there is something at `value`, whatever it is."""
        candidates = self._candidates(value)
        if there := next(filter(os.path.lexists, candidates), None):
            return there
        tried = " or ".join(dict.fromkeys(os.path.abspath(candidate) for candidate in candidates))
        reason = folder_fault(candidates[0]) or ""
        because = "" if reason == "no such folder" else f" ({reason})"
        unset = "; its variable is not set" if "$" in value else ""
        self.fault(f"{key} does not exist: {tried[:600]}{because}{unset}. Put the data there or correct the path.")
        return None

    def _candidates(self, value: str) -> list[Path]:
        return [self.folder / value, Path(value)]

    def _hint(self, value: str, data_dir: Path) -> str | None:
        """parquet_info is never needed, the files' own footers say more; so a missing one is worth a line only."""
        for candidate in (*self._candidates(value), data_dir / value):
            if not file_fault(candidate):
                return str(candidate)
        logger.info("%s: parquet_info %s does not exist; the files' own footers are used", self.where, value)
        return None

    # ---------------------------------------------------------------------------------------------------------- URIs
    def _remote_files(self, uri: str, named: Sequence[str]) -> tuple[str, ...]:
        """The parquet files at a URI of `pyarrow.fs`."""
        try:
            files = [filesystems.joined(uri, name) for name in named] or filesystems.parquet_files_in(uri)
            missing = [file for file in files if named and not filesystems.exists(file)]
        except FileNotFoundError:
            self.fault(f"data_dir does not exist: {uri}. Put the data there or correct the path.")
            return ()
        except Exception as error:  # what file systems raise on wrong URIs, hosts and credentials is an open set
            self.fault(f"data_dir {uri} cannot be opened ({type(error).__name__}: {' '.join(str(error).split())})")
            return ()
        if missing:
            self.fault(f"no such parquet file: {', '.join(missing[:_LISTED])}")
        elif not files:
            self.fault(f"{uri} holds no .parquet file")
        return () if missing else tuple(files)
