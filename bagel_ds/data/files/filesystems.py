"""Where data files lie: local paths, and for parquet also URIs of any `pyarrow.fs` file system (hdfs://, s3://, ...).

Guarantees: a path without `scheme://` is always a local path, whatever bytes its name holds. Only regular files are
opened, because opening a pipe would block. Each process makes a file system once per folder; a forked process makes its
own. Credentials and endpoints come from the environment or the URI's query.
"""

from __future__ import annotations

import os
import stat
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

_BUFFER_BYTES = 4 * 2**20  # of a column being read; without it a whole column of a row group is held at once
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}

_making = threading.Lock()
_folders: dict[str, tuple[fs.FileSystem, str]] = {}
_versions: dict[str, tuple[str, int, int]] = {}


class Unreadable(OSError):
    """A data file, or a part of it, that cannot be read; the message is the reason in words."""


def forget() -> None:
    """Drop the file systems of this process."""
    global _making
    _making = threading.Lock()  # a fork may have happened while another thread held it
    _folders.clear()
    _versions.clear()


os.register_at_fork(after_in_child=forget)


def shown(path: str) -> str:
    r"""The path for messages and logs: bytes that are not UTF-8 as \xff, so that any stream can print it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def regular_status(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a local regular file. Raises `Unreadable` for anything else."""
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            raise Unreadable(
                f"a link to {shown(os.readlink(path))}, which cannot be read ({error.strerror})"
            ) from error
        raise Unreadable(str(error.strerror)) from error
    except ValueError as error:  # a NUL in the name
        raise Unreadable(str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"{_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}, not a regular file")
    return status


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
    with _making:  # several threads read footers
        if folder + mark + query not in _folders:
            _folders[folder + mark + query] = fs.FileSystem.from_uri(folder + mark + query)
    filesystem, inner = _folders[folder + mark + query]
    return filesystem, f"{inner.rstrip('/')}/{name}" if inner else name


def open_file(path: str) -> pa.NativeFile:
    """A file of bytes behind a path or URI. Raises OSError, `Unreadable` for what is not a regular file."""
    if not is_uri(path):
        regular_status(path)
        return pa.OSFile(os.fsencode(path))
    filesystem, inner = resolve(path)
    return filesystem.open_input_file(inner)


def open_parquet(path: str) -> pq.ParquetFile:
    """The parquet file behind a path or URI; a column of a row group is read piece by piece."""
    return pq.ParquetFile(open_file(path), buffer_size=_BUFFER_BYTES)


def version(path: str, fresh: bool = False) -> tuple[str, int, int]:
    """(path, size in bytes, modification time in ns): changes when the file is replaced. Raises OSError.

    A process asks a remote file system once per file, unless `fresh`.
    """
    if not is_uri(path):
        status = regular_status(path)
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
    """Whether there is a file. Raises OSError where the file system does not answer."""
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
