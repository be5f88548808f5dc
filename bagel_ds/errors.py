"""The one exception a person can cause, and what to say about an error of the system.

Guarantees: a `UserError` reaches the terminal as its message alone, without a traceback, and ends the process with exit
code 2. Everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_MOST_LISTED = 12


class UserError(ValueError):
    """Bad input. The message names the file or argument, what was found, what was expected and what to do."""


def disk_fault(error: OSError, otherwise: str) -> str:
    """What the system refused, where and why, and what helps: for a full disk space, else not."""
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    reason = f"{' -> '.join(files) or 'the disk'}: {error.strerror or error or type(error).__name__}."
    if error.errno in NO_SPACE:
        return f"{reason} Free space there, or {otherwise}."
    if error.errno in _NOT_ALLOWED:
        return f"{reason} Make that place writable, or {otherwise}."
    return f"{reason} If it happens again, {otherwise}."


def all_faults(faults: list[str], heading: str) -> None:
    """Raise one `UserError` that lists every fault, or return when there is none."""
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(heading + "\n" + "\n".join(f"  - {fault}" for fault in faults))


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, or all of them, or of many the three nearest."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    if len(names) > _MOST_LISTED:
        return f"the nearest known ones are {', '.join(difflib.get_close_matches(name, names, n=3, cutoff=0.0))}"
    return f"known: {', '.join(names) or 'none'}."
