"""The exception for mistakes of the user, and the words for what was found.

Guarantees: a `UserError` reaches the terminal as its message only, without a traceback, and ends the process with exit
code 2. Any other exception is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_MOST_LISTED = 12
_LONGEST_SHOWN = 60  # characters of a value
_LARGEST_SHOWN_BITS = 200


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


def shown(value: Any) -> str:
    """A value that was found in a file, for a message: short, whatever it holds and however deeply it nests."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > _LARGEST_SHOWN_BITS:
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, (str, bytes, int, float)):
        return f"a {type(value).__name__}"
    text = repr(value if isinstance(value, (int, float)) else value[:_LONGEST_SHOWN])
    return text if isinstance(value, (int, float)) or len(value) <= _LONGEST_SHOWN else f"{text}..."


def nearest(name: Any, known: Iterable[Any]) -> str:
    """A remedy for an unknown name: the nearest known one, or all of them, or of many the three nearest."""
    names, name = sorted(each for each in known if isinstance(each, str)), shown(name).strip("'")
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    if len(names) > _MOST_LISTED:
        return f"the nearest known ones are {', '.join(difflib.get_close_matches(name, names, n=3, cutoff=0.0))}"
    return f"known: {', '.join(names) or 'none'}."
