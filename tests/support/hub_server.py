"""A model hub and a package index on loopback, with the routes that the real clients use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from mlxroute.closeable import Closeable

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What a server serves, its faults, and the requests it received.

    Args:
        repositories: Files of the hub, by hub id and name.
        wheels: Files of the package index, by name.
        altered: Names of hub files that are sent with one bit changed.
        cut: By file name, the number of bytes after which the next transfer is cut.
        paused: By file name, the number of bytes after which the next transfer waits for `release`.
        held: Paths that are not answered until `release` is set.
        stalled: Whether no path is answered until `release` is set.
        refused_token: Status for requests with a token; 0 if tokens are accepted.
        refusal: Status and error code for all requests; status 0 for none.
        refused_files: Status and error code for the files; status 0 for none.
        listing: What is sent in place of every listing; empty for the listings themselves.
        release: Ends the waits of `paused`, `held` and `stalled`.
        requests: Number of requests, by method and path.
        ranges: Range headers received.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    wheels: dict[str, bytes] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    paused: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    stalled: bool = False
    refused_token: int = 0
    refusal: tuple[int, str] = (0, "")
    refused_files: tuple[int, str] = (0, "")
    listing: bytes = b""
    release: threading.Event = field(default_factory=threading.Event)
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)


class SiteServer(Closeable):
    """Serves a Site on loopback within a `with` block."""

    def __init__(self, site: Site) -> None:
        self.site = site
        handler = type("Handler", (_Handler,), {"site": site})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Address without a trailing slash."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """Answer all waiting requests and stop."""
        self.site.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.site.requests[f"{self.command} {path}"] += 1
        if self.site.stalled or path in self.site.held:
            self.site.release.wait(30)
        status, code = self.site.refused_files if "/resolve/" in path else self.site.refusal
        if self.site.refused_token and self.headers.get("Authorization"):
            status, code = self.site.refused_token, ""
        if status:
            reason = "" if code else "Invalid credentials in Authorization header"
            headers = {"X-Error-Code": code, "X-Error-Message": reason}
            self._send(b"{}", body=body, status=status, headers=headers)
            return
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
        if self.site.listing:
            return self.site.listing
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
        if byte_range := self.headers.get("Range"):
            self.site.ranges.append(byte_range)
            start = int(byte_range.removeprefix("bytes=").partition("-")[0])
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
            file = self.path.rpartition("/")[2]
            limit = self.site.cut.pop(file, None)
            if (before := self.site.paused.pop(file, None)) is not None:
                self.wfile.write(content[:before])
                self.site.release.wait(30)
                content = content[before:]
            self.wfile.write(content[:limit])
            self.close_connection = limit is not None


def git_blob_id(content: bytes) -> str:
    """Return git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    return {"sha256": digest, "size": len(content), "pointerSize": 130}
