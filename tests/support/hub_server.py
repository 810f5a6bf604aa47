"""A model hub and a package index on loopback, as far as the real clients need them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What a server serves, and how it misbehaves.

    `repositories` are files by hub id and name, `wheels` by file name. `altered` are hub files
    sent with one byte changed, `cut` sends only that many bytes of a path, once. A path in
    `held` gets no answer until `release` is set; `stalled` answers nothing at all.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    wheels: dict[str, bytes] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    stalled: bool = False
    release: threading.Event = field(default_factory=threading.Event)
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)


class SiteServer:
    """Serves a Site until the `with` block ends."""

    def __init__(self, site: Site) -> None:
        self.site = site
        handler = type("Handler", (_Handler,), {"site": site})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """The address, without a final slash."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.site.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.site.requests[f"{self.command} {path}"] += 1
        if self.site.stalled or path in self.site.held:
            self.site.release.wait(30)
        match path.strip("/").split("/"):
            case ["api", "models", org, name, *_] if f"{org}/{name}" in self.site.repositories:
                self._send(self._listing(f"{org}/{name}"), body=body, kind="application/json")
            case [org, name, "resolve", _, file] if file in self.site.repositories.get(
                f"{org}/{name}", ()
            ):
                self._send_file(self.site.repositories[f"{org}/{name}"][file], file, body=body)
            case ["simple", package]:
                self._send(self._links(package), body=body, kind="text/html")
            case ["wheels", file] if file in self.site.wheels:
                self._send(self.site.wheels[file], body=body, kind="application/zip")
            case _:
                headers = {"X-Error-Code": "RepoNotFound"}
                self._send(b'{"error": "none"}', body=body, status=404, headers=headers)

    def _listing(self, hub_id: str) -> bytes:
        siblings = [
            {
                "rfilename": file,
                "size": len(content),
                "blobId": git_blob_id(content),
                **({"lfs": _lfs(content)} if file.endswith(".safetensors") else {}),
            }
            for file, content in self.site.repositories[hub_id].items()
        ]
        return json.dumps({"id": hub_id, "sha": REVISION, "siblings": siblings}).encode()

    def _links(self, package: str) -> bytes:
        stem = package.replace("-", "_") + "-"
        names = [name for name in self.site.wheels if name.startswith(stem)]
        return "".join(f'<a href="/wheels/{name}">{name}</a>' for name in names).encode()

    def _send_file(self, content: bytes, file: str, *, body: bool) -> None:
        large = file.endswith(".safetensors")
        digest = _lfs(content)["sha256"] if large else git_blob_id(content)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if file in self.site.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        if asked := self.headers.get("Range"):
            self.site.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._send(content, body=body, status=status, headers=headers)

    def _send(
        self,
        content: bytes,
        *,
        body: bool,
        status: int = 200,
        kind: str = "application/octet-stream",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            limit = self.site.cut.pop(self.path.rpartition("/")[2], None)
            self.wfile.write(content[:limit])
            self.close_connection = limit is not None


def git_blob_id(content: bytes) -> str:
    """The id git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    return {"sha256": digest, "size": len(content), "pointerSize": 130}
