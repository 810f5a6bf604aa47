"""A proxy on this machine in front of a server: the base of those that change its replies."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final, Self

from mlxroute.closeable import Closeable
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.connections import Auth, HttpSessionPool, check_ca_bundle

_TIMEOUT_S: Final = 1800.0


class LoopbackProxy(Closeable):
    """A loopback server whose replies a subclass makes, from those of `upstream` or its own.

    Args:
        upstream: Address of the real server.
        port: The port to listen on. 0 (default) for a free one.
        api_key: The key of the real server. None (default) for none.
        ca_bundle: File of certificate authorities to trust. None (default) for the public ones.

    Attributes:
        upstream_url: The normalised address of the real server.
        event_gap_s: Seconds between the events of a streamed reply. 0 at first.
    """

    def __init__(
        self,
        upstream: str,
        *,
        port: int = 0,
        api_key: str | None = None,
        ca_bundle: Path | None = None,
    ) -> None:
        address = parse_address(upstream)
        self.upstream_url = address.url
        self.event_gap_s = 0.0
        self._sessions = HttpSessionPool(address, Auth(address, api_key))
        self._verify = True if ca_bundle is None else check_ca_bundle(ca_bundle)
        self._server = _Server(("127.0.0.1", port), self)

    @property
    def root_url(self) -> str:
        """The URL of this server, without a path."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def close(self) -> None:
        """End the server and its connections."""
        self._server.shutdown()
        self._server.server_close()
        self._sessions.close()

    def serve(self) -> None:
        """Serve until the process is interrupted."""
        self._server.serve_forever()

    @abstractmethod
    def reply(self, method: str, path: str, body: bytes) -> tuple[int, list[bytes]]:
        """Return the status and the body of the reply to a request, or the events of a stream."""

    def forward(self, method: str, url: str, body: bytes) -> tuple[int, bytes]:
        """Send a request to the real server; return the status and the body of its reply."""
        session = self._sessions.acquire()
        try:
            response = session.request(
                method,
                url,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=_TIMEOUT_S,
                allow_redirects=False,
                verify=self._verify,
            )
        finally:
            self._sessions.release(session)
        return response.status_code, response.content


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], proxy: LoopbackProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close their connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _send_reply(self) -> None:
        assert isinstance(self.server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy = self.server.proxy
        status, parts = proxy.reply(self.command, self.path, body)
        self.send_response(status)
        if len(parts) == 1:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(parts[0])))
            self.end_headers()
            self.wfile.write(parts[0])
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, part in enumerate(parts):
            # The first event was delayed already; the last has the token counts only.
            if 0 < number < len(parts) - 1:
                time.sleep(proxy.event_gap_s)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = _send_reply

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""
