"""The folder that the pictures and videos of a jsonl lie in, and which files there may be opened.

Guarantees: a name in a data file leads only to files below the folder, and to places that links there may lead to: the
folders that the user names as `linked_dirs`, and the repository of a Hugging Face cache where the folder is one of its
snapshots (the files there are links into ../../blobs). Nothing is opened here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

_REPOSITORY_KINDS = ("datasets--", "models--", "spaces--")


class RefusedPath(ValueError):
    """A name that leads to no allowed place; the message continues "the image path 'a.png' "."""


@dataclass(frozen=True)
class ImageFolder:
    """`path`: the folder; `linked`: further folders that links in it may lead to. Both are local paths."""

    path: str = ""
    linked: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What the index remembers of it; "" where a data file holds its pictures."""
        return " ".join(os.path.abspath(part) for part in (self.path, *self.linked) if part)

    def file(self, name: str) -> Path:
        """The path of `name`, which is relative, or absolute and below the folder. Raises `RefusedPath`."""
        if "\0" in name or ".." in PurePosixPath(name).parts or PureWindowsPath(name).drive:
            raise RefusedPath("leaves the image folder")
        path = Path(self.path, name)  # an absolute name replaces the folder
        if os.path.isabs(name) and not any(path.is_relative_to(root) for root in _roots(self)):
            raise RefusedPath("leaves the image folder")
        try:
            target = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a name that is too long
            raise RefusedPath(f"cannot be followed ({type(error).__name__})") from error
        if not any(target.is_relative_to(root) for root in _allowed(self)):
            raise RefusedPath(
                f"is a link that leaves the image folder (to {target}); to allow that, name a folder that holds the "
                "target as `linked_dirs` of the dataset"
            )
        return path


@lru_cache(maxsize=64)
def _roots(folder: ImageFolder) -> tuple[Path, ...]:
    """How absolute names of files in the folder begin."""
    return Path(os.path.abspath(folder.path)), Path(folder.path).resolve()


@lru_cache(maxsize=64)
def _allowed(folder: ImageFolder) -> tuple[Path, ...]:
    """Resolved folders that hold every file that may be opened."""
    path = Path(folder.path).resolve()
    return path, *hub_repository(path), *(Path(linked).resolve() for linked in folder.linked)


def hub_repository(path: Path) -> list[Path]:
    """The folder of a repository in a Hugging Face cache that holds `path` in a snapshot; [] for any other path."""
    for parent in (path, *path.parents):
        snapshots = parent.parent
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith(_REPOSITORY_KINDS):
            return [repository]
    return []
