"""One file over HTTP, continued where it was cut off.

Guarantees: the file appears under its name when it is whole; until then it is NAME.part. A part is continued only if
the server still has the same file. A connection that breaks is tried again, with pauses, as long as bytes arrive.
"""

from __future__ import annotations

import errno
import http.client
import json
import logging
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from bagel_ds.errors import UserError, disk_fault
from bagel_ds.units import GIB

logger = logging.getLogger("bagel_ds")

ATTEMPTS = 5  # without any progress
_TIMEOUT = 60.0  # seconds without a byte
_READ = 2**20
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class Pause:
    """Counts attempts without progress, and waits between them: 1, 2, 4, ... seconds."""

    unit = 1.0

    def __init__(self) -> None:
        self._failed = 0

    def after(self, error: Exception, is_final: bool = False, progress: bool = False) -> bool:
        """Wait before another attempt; False if there should be none."""
        self._failed = 1 if progress else self._failed + 1
        if is_final or self._failed >= ATTEMPTS:
            return False
        wait = self.unit * 2 ** (self._failed - 1)
        logger.warning("%s: trying again in %.0f s", " ".join(str(error).split())[:200] or type(error).__name__, wait)
        time.sleep(wait)
        return True


def fetch(url: str, target: Path, headers: Mapping[str, str] | None = None) -> None:
    """Download `url` to `target`, with `headers` for its host only. Raises `UserError`."""
    part, pause = target.with_name(f"{target.name}.part"), Pause()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _continue(url, part, headers or {})
            part.rename(target)
            part.with_name(f"{part.name}.json").unlink(missing_ok=True)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            is_final = 400 <= error.code < 500 and error.code not in (408, 416, 429)
            if not pause.after(error, is_final):
                remedy = "check the address" if is_final else "try the same command later"
                raise UserError(f"{url}: the server says {error.code} {error.reason}; {remedy}") from None
        except _NETWORK as error:
            now = part.stat().st_size if part.exists() else 0
            if not pause.after(error, progress=now > before):
                raise UserError(
                    f"{url} can't be downloaded ({error}). What has arrived stays in {part}: the same command "
                    f"continues there. Without a network, download it on another machine and copy it to {target}"
                ) from None
        except OSError as error:
            raise UserError(f"{url}: {disk_fault(error, 'pass another --out')}") from None


def check_room(folder: Path, needed: int) -> None:
    """Raise `UserError` unless `needed` bytes are free where `folder` is or will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(
            f"{folder} has {free / GIB:.1f} GiB free, and {needed / GIB:.1f} GiB are needed; free space there, or pass "
            "another --out"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Does not hand a token to another host, such as the storage that the hub redirects to."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        again = super().redirect_request(req, fp, code, msg, headers, newurl)
        if again is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            again.remove_header("Authorization")
        return again


_opener = urllib.request.build_opener(_Redirects)


def _continue(url: str, part: Path, given: Mapping[str, str]) -> None:
    """Append to `part` until it is whole. Raises what went wrong."""
    record = part.with_name(f"{part.name}.json")
    begin = part.stat().st_size if part.exists() else 0
    known = json.loads(record.read_text()) if begin and record.exists() else {}
    headers = {"User-Agent": "bagel-ds", **given, "Accept-Encoding": "identity"}
    if begin and known.get("url") == url and known.get("etag"):
        headers |= {"Range": f"bytes={begin}-", "If-Range": known["etag"]}
    else:
        begin = 0
    if begin and begin == known.get("size"):
        return
    with _opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        if answer.status != 206:  # from the start, also because the file there is another one now
            begin = 0
        length = answer.headers.get("Content-Length")
        size = None if length is None else begin + int(length)
        check_room(part.parent, (size or 0) - begin)
        etag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        record.write_text(json.dumps({"url": url, "etag": etag, "size": size}))
        with part.open("ab" if begin else "wb") as file:
            with tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=part.stem) as shown:
                while block := answer.read(_READ):
                    file.write(block)
                    shown.update(len(block))
    found = part.stat().st_size
    if size is not None and found < size:
        raise ConnectionError(errno.ECONNRESET, f"the connection ended after {found:,} of {size:,} bytes")
