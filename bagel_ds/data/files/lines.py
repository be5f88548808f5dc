"""Where the lines of a jsonl file lie.

Guarantees: one pass, 16 bytes of memory per line. A file that is not JSON lines as a whole (a JSON array, compressed,
UTF-16, parquet) is refused with one message. Lines are not parsed otherwise.
"""

from __future__ import annotations

import json
from array import array
from hashlib import blake2b

import numpy as np

from bagel_ds.data.files.filesystems import Unreadable, regular_status

UTF8_MARK = b"\xef\xbb\xbf"
_WANTED = "expected one JSON object per line"
_ARRAY = "the file is a JSON array; write each of its items on a line of its own (`jq -c '.[]'`)"
_ARRAY_BYTES = 2**20  # a line that begins like an array and is longer is one
_STARTS = (
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"), "the file is compressed; unpack it"),
    ((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0["), "the file is UTF-16 or UTF-32; convert it to UTF-8"),
    ((b"\0\0\xfe\xff", b"\0\0\0{"), "the file is UTF-32; convert it to UTF-8"),
    ((b"PAR1",), "the file is parquet"),
)


def jsonl_lines(path: str) -> tuple[np.ndarray, bytes]:
    """(int64 [lines, 2]: offset and length in bytes of every line, without its line break; a digest of the file).

    A blank line has length 0. Raises OSError, and `Unreadable` where the file as a whole is something else.
    """
    regular_status(path)
    places, offset = array("q"), 0  # a list would take 100 bytes per line
    digest = blake2b(digest_size=16)
    first, second, last = b"", b"", b""  # lines that are not blank
    with open(path, "rb") as file:
        start = file.read(_ARRAY_BYTES)
        for marks, fault in _STARTS:
            if start.startswith(marks):
                raise Unreadable(f"{_WANTED}: {fault}")
        if start.lstrip(b" \t\r\n").startswith(b"[") and len(start) == _ARRAY_BYTES and b"\n" not in start.lstrip():
            raise Unreadable(f"{_WANTED}: {_ARRAY}")  # before a line as long as the file is read
        file.seek(0)
        for line in file:
            digest.update(line)
            skipped = len(UTF8_MARK) if not offset and line.startswith(UTF8_MARK) else 0
            content = line[skipped:].rstrip(b"\r\n")
            if not content.strip():
                places.extend((offset, 0))
            else:
                places.extend((offset + skipped, len(content)))
                last = content
                if not first:
                    first = content
                elif not second:
                    second = content
            offset += len(line)
    if fault := _whole_file_fault(first.strip(), second.strip(), last.strip()):
        raise Unreadable(f"{_WANTED}: {fault}")
    return np.array(places, dtype=np.int64).reshape(-1, 2), digest.digest()


def _whole_file_fault(first: bytes, second: bytes, last: bytes) -> str:
    """What the file is instead of JSON lines, else empty. One bad line among good ones is not a fault of the file."""
    if first.startswith(b"[") and (last.endswith(b"]") or not _is_object(second)):
        return _ARRAY
    if first == b"{" and second and not _is_object(second):
        return "its objects run over several lines; write each on a line of its own (`jq -c .`)"
    return ""


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
