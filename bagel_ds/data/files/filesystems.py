"""Where parquet files lie: local paths, and URIs of any `pyarrow.fs` file system (hdfs://, s3://, gs://, file://).

Guarantees: a path without `scheme://` is never anything but a local path. A file system is made once per process
and folder, and not inherited by a forked process. Credentials and endpoints are the file system's own affair
(environment, query of the URI).
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

_BUFFER_BYTES = 4 * 2**20  # of a column being read; without it all of a row group's column is held at once

_making = threading.Lock()
_folders: dict[str, tuple[fs.FileSystem, str]] = {}
_versions: dict[str, tuple[str, int, int]] = {}


def forget() -> None:
    """Close what this process has open."""
    global _making
    _making = threading.Lock()  # a fork may have happened while a thread of the parent held it
    _folders.clear()
    _versions.clear()


os.register_at_fork(after_in_child=forget)


def is_uri(path: str) -> bool:
    """Whether `path` names a place of a `pyarrow.fs` file system rather than a local path."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme.replace("+", "").isalnum()


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it. Raises what pyarrow does for a URI it cannot open."""
    place, mark, query = uri.partition("?")
    folder, _, name = place.rstrip("/").rpartition("/")
    if folder.endswith("/"):  # scheme://name, or a file in the root folder
        return fs.FileSystem.from_uri(uri)
    with _making:  # footers are read by several threads
        if folder + mark + query not in _folders:
            _folders[folder + mark + query] = fs.FileSystem.from_uri(folder + mark + query)
    filesystem, inner = _folders[folder + mark + query]
    return filesystem, f"{inner.rstrip('/')}/{name}" if inner else name


def open_parquet(path: str) -> pq.ParquetFile:
    """The file behind a path or URI; a column of a row group is read piece by piece."""
    if not is_uri(path):
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES)
    filesystem, inner = resolve(path)
    return pq.ParquetFile(filesystem.open_input_file(inner), buffer_size=_BUFFER_BYTES)


def parquet_footer(path: str) -> bytes:
    """The bytes at a parquet file's end that say where every column of every row group lies. Raises OSError."""
    filesystem, inner = resolve(path) if is_uri(path) else (fs.LocalFileSystem(), path)
    with filesystem.open_input_file(inner) as file:
        size = file.size()
        length = int.from_bytes(file.read_at(4, size - 8), "little")  # then b"PAR1"
        footer: bytes = file.read_at(min(length, size - 8), max(size - 8 - length, 0))
        return footer


def version(path: str, fresh: bool = False) -> tuple[str, int, int]:
    """(path, size in bytes, modification time in ns): a file that was replaced is another file. Raises OSError.

    A process asks a remote file system once per file, unless `fresh`.
    """
    if not is_uri(path):
        status = os.stat(path)
        return path, status.st_size, status.st_mtime_ns
    if fresh or path not in _versions:
        info = _info(path)
        _versions[path] = path, info.size or 0, info.mtime_ns or 0
    return _versions[path]


def parquet_files_in(uri: str) -> list[str]:
    """URIs of the `.parquet` files of a folder, sorted; or `uri` itself where it is a file. Raises OSError."""
    if _info(uri).type == fs.FileType.File:
        return [uri]
    filesystem, inner = resolve(uri)
    found = filesystem.get_file_info(fs.FileSelector(inner))
    names = sorted(info.base_name for info in found if info.type == fs.FileType.File)
    return [joined(uri, name) for name in names if name.endswith(".parquet") and not name.startswith(".")]


def exists(uri: str) -> bool:
    """Whether there is a file. Raises OSError where that cannot be told."""
    filesystem, inner = resolve(uri)
    return bool(filesystem.get_file_info(inner).type == fs.FileType.File)


def joined(uri: str, name: str) -> str:
    """The file `name` of the folder `uri`; a query (`?endpoint_override=...`) stays at the end."""
    place, mark, query = uri.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def _info(uri: str) -> Any:
    filesystem, inner = resolve(uri)
    info = filesystem.get_file_info(inner)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"no such file: {uri}")
    return info
