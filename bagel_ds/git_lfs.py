"""Git LFS pointers: the three lines of text that `git clone` leaves in place of a large file.

Guarantees: a pointer is recognized by its content, whatever its name, and the message says what it is and how to get
the file. Reads at most one block, of regular files only.
"""

from __future__ import annotations

from pathlib import Path

from bagel_ds.regular_files import file_fault

_FIRST_LINES = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LARGEST = 1024  # bytes; the specification's limit


def pointer_fault(source: Path | str | bytes) -> str | None:
    """What to do about a file, or its content, that is a pointer, for a message that has named it; None otherwise."""
    if isinstance(source, bytes):
        start = source[:_LARGEST]
    else:
        if file_fault(source):
            return None
        try:
            with open(source, "rb") as file:
                start = file.read(_LARGEST)
        except OSError:
            return None
    if not start.removeprefix(b"\xef\xbb\xbf").startswith(_FIRST_LINES):
        return None
    return _remedy(start)


def _remedy(content: bytes) -> str:
    """The message about a pointer, with the size of the file that it stands for."""
    sizes = [line[5:] for line in content.decode("utf-8", "replace").splitlines() if line.startswith("size ")]
    size = f" of {int(sizes[0]):,} bytes" if sizes and sizes[0].isdecimal() else ""
    return (
        f"it is a Git LFS pointer, not the file{size} itself. Run `git lfs install && git lfs pull` in the cloned "
        "repository, or download the file with `hf download`"
    )
