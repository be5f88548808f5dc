"""HTTP for the page, by Python's own server.

Guarantees: on a loopback address only requests for that address are answered, so that a web site whose name is made to
point here (DNS rebinding) gets nothing; what starts work must come from the page itself; nothing is read from or
written to the disk but the page's own files. There is no password: on other addresses anyone who reaches them may ask.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6
from typing import Any
from urllib.parse import urlsplit

from bagel_ds.errors import UserError
from bagel_ds.inference.settings import MODES, RENORM_TYPES, default_settings
from bagel_ds.units import MIB
from bagel_ds.web.models import TITLES
from bagel_ds.web.work import Work

logger = logging.getLogger("bagel_ds")

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
MOST_BYTES = 64 * MIB  # of a request, its pictures included
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class _Refused(Exception):
    """A status and a message instead of an answer."""

    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, work: Work, host: str, port: int) -> None:
        self.loopback = _is_loopback(host)
        if ":" in host:
            self.address_family = AF_INET6
        try:
            super().__init__((host, port), partial(_Handler, work))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"can't serve at {host}, port {port}: {reason}; pass another --host or --port") from None

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60

    def __init__(self, work: Work, *arguments: Any) -> None:
        self._work = work
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not every request: the page asks twice a second."""

    # ---------------------------------------------------------------------------------------------------- requests
    def _get(self) -> tuple[bytes, str]:
        path = urlsplit(self.path).path
        if path in FILES:
            name, kind = FILES[path]
            return (PAGE / name).read_bytes(), kind
        match path.strip("/").split("/"):
            case ["api", "model"]:
                return _json(self._model())
            case ["api", "jobs", name]:
                return _json(self._job(name))
            case ["api", "jobs", name, panel, item] if panel.isdecimal() and item.isdecimal():
                panels = self._work.job(name).panels
                items = panels[int(panel)].items if int(panel) < len(panels) else []
                if int(item) < len(items) and isinstance(found := items[int(item)], bytes):
                    return found, "image/png"
        raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {path} here")

    def _post(self) -> tuple[bytes, str]:
        content = self._content()
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "jobs"]:
                return _json({"name": self._work.add(_words(content))})
            case ["api", "jobs", name, "stop"]:
                self._work.job(name).stopping = True
                return _json({})
        raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path} here")

    def _model(self) -> dict[str, Any]:
        """What the page shows before anything is asked."""
        models = self._work.models
        defaults = {
            mode + ("+image" if has_image else ""): vars(default_settings(mode, has_image))
            for mode in MODES
            for has_image in (False, True)
        }
        return {
            "path": str(models.path),
            "weights": [{"name": name, "title": TITLES[name]} for name in models.names],
            "adapters": models.default.network.adapters.weights,
            "cannot_draw": models.default.cannot_draw,
            "stride": models.default.network.layout.latent_stride,
            "renorm_types": RENORM_TYPES,
            "most_bytes": MOST_BYTES,
            "defaults": defaults,
        }

    def _job(self, name: str) -> dict[str, Any]:
        job = self._work.job(name)
        panels = [
            {
                "title": panel.title,
                "items": [
                    {"text": item} if isinstance(item, str) else {"image": f"api/jobs/{name}/{number}/{place}"}
                    for place, item in enumerate(panel.items)
                ],
            }
            for number, panel in enumerate(job.panels)
        ]
        return {
            "state": job.state,
            "ahead": self._work.ahead(job),
            "step": job.steps[0],
            "steps": job.steps[1],
            "under_way": TITLES[job.weights[min(len(job.panels), len(job.weights) - 1)]],
            "panels": panels,
            "error": job.error,
        }

    # -------------------------------------------------------------------------------------------------------- HTTP
    def _content(self) -> dict[str, Any]:
        """The request's JSON object, from the page itself."""
        # A page of another site can't send this type without asking first, and that is not answered here.
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise _Refused(HTTPStatus.FORBIDDEN, "this request comes from another site")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected Content-Length")
        if int(length) > MOST_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request has {int(length) / MIB:.0f} MiB, at most {MOST_BYTES / MIB:.0f} are taken: pass smaller "
                "or fewer pictures",
            )
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the request is not JSON") from None
        if not isinstance(found, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the request is not a JSON object")
        return found

    def _answer(self, make: Any) -> None:
        status = HTTPStatus.OK
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if self.server.loopback and not _is_loopback(host or ""):
                raise _Refused(HTTPStatus.FORBIDDEN, f"this page is not served as {host}")
            content, kind = make()
        except _Refused as refused:
            status, (content, kind) = refused.status, _json({"error": str(refused)})
        except UserError as fault:
            status, (content, kind) = HTTPStatus.BAD_REQUEST, _json({"error": str(fault)})
        except (TimeoutError, ConnectionError):
            self.close_connection = True
            return
        except Exception as error:
            logger.exception("%s failed", self.path)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content, kind = _json({"error": f"{type(error).__name__}: {error}"})
        try:
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the browser has gone
            self.close_connection = True


def _json(content: Any) -> tuple[bytes, str]:
    return json.dumps(content).encode(), "application/json"


def _words(content: dict[str, Any]) -> dict[str, Any]:
    """A request's words; its `images`, in base64, as bytes. Raises `UserError`."""
    images = content.pop("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError("images: expected a list of texts in base64")
    try:
        decoded = [base64.b64decode(image, validate=True) for image in images]
    except binascii.Error:
        raise UserError("images: not base64") from None
    if not isinstance(content.get("prompt", ""), str) or not isinstance(content.get("think", False), bool):
        raise UserError("prompt must be a text, think True or False")
    return {**content, "image": decoded or None}
