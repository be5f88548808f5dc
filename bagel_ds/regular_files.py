"""Why a path that a user gave is not a file, or not a folder, that can be opened.

Guarantees: only looks (`stat`), so that a named pipe never makes the caller wait in `open`. Names that the file system
can't hold (too long, a NUL byte) are faults like any other. Nothing is raised.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def file_fault(path: Path | str) -> str | None:
    """What keeps `path` from being read as a regular file, for a message that has named it; None where it is one."""
    return _fault(path, stat.S_IFREG, "file")


def folder_fault(path: Path | str) -> str | None:
    """The same for a folder."""
    return _fault(path, stat.S_IFDIR, "folder")


def _fault(path: Path | str, wanted: int, word: str) -> str | None:
    try:
        found = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        if os.path.islink(path):
            return f"it is a link to {os.readlink(path)}, which does not exist"
        return f"no such {word}"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # NUL bytes, and letters that have no bytes
        return f"not a file name ({error})"
    return None if found == wanted else f"it is {_KINDS.get(found, 'a file')}, not a {word}"
