"""A server on this machine: files with ranges, connections that are cut, and as much of the hub's API as is called."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = 2**16  # bytes from which a file has a checksum, as those in Git LFS have


class Server:
    """Serves `files` by path at `url`, and models of the hub: `models[repo][name]`.

    Each of the next `cuts` answers to a GET of a large file ends after that share of it; after the last of them, every
    answer is the status `then`, if there is one. Large files are redirected to `storage`, if there is one. `sent`
    counts bytes of files by path, `commits` holds the files of what was uploaded, by repo.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.models: dict[str, dict[str, bytes]] = {}
        self.cuts: list[float] = []
        self.sent: dict[str, int] = {}
        self.asked: list[str] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.then: int | None = None
        self.storage: str | None = None
        self.tokens: set[str | None] = set()  # that files were asked for with
        self.refusal: int | None = None  # an HTTP status for everything
        outer = self

        class Handler(_Handler):
            server_of_test = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of_test: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(with_content=False)

    def do_GET(self) -> None:
        self._get(with_content=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, server = urlsplit(self.path).path, self.server_of_test
        server.asked.append(f"POST {path}")
        if server.refusal is not None:
            return self._json({"error": "refused"}, server.refusal)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            return self._json({"url": f"{server.url}/{name}", "name": name})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._json({"files": files})
        if path == "/api/validate-yaml":  # the head of a card
            return self._json({"errors": [], "warnings": []})
        repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
        entries = [json.loads(line) for line in body.splitlines()]
        server.commits[repo] = {
            entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
            for entry in entries
            if entry["key"] == "file"
        }
        address = f"{server.url}/{repo}/commit/{REVISION}"
        return self._json({"success": True, "commitUrl": address, "commitOid": REVISION, "hookOutput": ""})

    def _get(self, with_content: bool) -> None:
        path, server = unquote(urlsplit(self.path).path), self.server_of_test
        server.asked.append(f"{self.command} {path}")
        if server.refusal is not None:
            return self._json({"error": "refused"}, server.refusal)
        if path.startswith("/api/models/"):
            return self._model(path.removeprefix("/api/models/"))
        content, extra = server.files.get(path), {}
        if "/resolve/" in path:
            repo, _, name = path.strip("/").partition("/resolve/")
            content = server.models.get(repo, {}).get(name.partition("/")[2])
            extra = {"X-Repo-Commit": REVISION}
            if content is not None and len(content) >= LARGE:
                extra |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        if content is None:
            return self._json({"error": "not found"}, 404)
        self._file(path, content, extra, with_content)

    def _file(self, path: str, content: bytes, extra: dict[str, str], with_content: bool) -> None:
        server, etag, begin = self.server_of_test, f'"{_sha256(content)}"', 0
        server.tokens.add(self.headers.get("Authorization"))
        if server.storage is not None and len(content) >= LARGE:
            return self._json({}, 302, {"Location": server.storage})
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.headers.get("If-Range", etag) == etag:
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
        if begin > len(content):
            return self._json({}, 416)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        for name, value in {"ETag": etag, "Accept-Ranges": "bytes", **extra}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if not with_content:
            return
        end = len(content)
        if server.cuts and end >= LARGE:
            end = begin + int((len(content) - begin) * server.cuts.pop(0))
            if not server.cuts:
                server.refusal = server.then
        server.sent[path] = server.sent.get(path, 0) + end - begin
        self.wfile.write(content[begin:end])
        if end < len(content):
            self.close_connection = True

    def _model(self, asked: str) -> None:
        repo = "/".join(asked.split("/")[:2])
        files = self.server_of_test.models.get(repo)
        if files is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in asked:
            return self._json([{**_described(name, files[name]), "type": "file", "path": name} for name in files])
        siblings = [{**_described(name, files[name]), "rfilename": name} for name in files]
        return self._json({"id": repo, "modelId": repo, "sha": REVISION, "siblings": siblings, "private": False})

    def _json(self, content: Any, status: int = 200, extra: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _described(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    found: dict[str, Any] = {"size": len(content), "blobId": blob, "oid": blob}
    if len(content) >= LARGE:
        pointer = {"sha256": _sha256(content), "oid": _sha256(content), "size": len(content), "pointerSize": 134}
        found["lfs"] = pointer
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
