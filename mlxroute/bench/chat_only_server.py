"""A proxy in front of a server that leaves only its chat route, without begun answers.

It makes a server that is at hand one that only chats, as most providers' servers are. Run it with

    python -m mlxroute.bench.chat_only_server http://127.0.0.1:8081/v1 8082
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self

from mlxroute.large.http.address import parse_address
from mlxroute.large.http.connections import Auth, HttpSessionPool

_TIMEOUT_S: Final = 1800.0
# Fields of a chat request that every provider knows; others would continue a begun answer.
_FIELDS: Final = {"model", "messages", "max_tokens", "temperature", "logprobs", "top_logprobs"}
_NOT_FOUND: Final = (404, b'{"error": {"message": "Not Found"}}')


class ChatOnlyServer:
    """A loopback proxy that passes on the list of models and chat requests.

    A request that begins the answer is refused, as is one with an unusual field.

    Args:
        upstream: Address of the real server.
        port: The port to listen on. 0 (default) for a free one.
    """

    def __init__(self, upstream: str, *, port: int = 0) -> None:
        address = parse_address(upstream)
        self._sessions = HttpSessionPool(address, Auth(address, None))
        self._url = address.url
        self._server = _Server(("127.0.0.1", port), self)

    @property
    def url(self) -> str:
        """The URL to use instead of `upstream`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._sessions.close()

    def serve(self) -> None:
        """Serve until the process is interrupted."""
        self._server.serve_forever()

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Return the status and the body of the reply to a request."""
        if (method, path) == ("GET", "/v1/models"):
            return self._forward(method, "/models", body)
        if (method, path) != ("POST", "/v1/chat/completions"):
            return _NOT_FOUND
        request = json.loads(body)
        if (unknown := set(request) - _FIELDS) or request["messages"][-1]["role"] != "user":
            text = (
                f"unknown field {min(unknown)}" if unknown else "the last message must be a user's"
            )
            return 400, json.dumps({"error": {"message": text}}).encode()
        return self._forward(method, "/chat/completions", body)

    def _forward(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        session = self._sessions.acquire()
        try:
            response = session.request(
                method,
                self._url + path,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=_TIMEOUT_S,
                allow_redirects=False,
            )
        finally:
            self._sessions.release(session)
        return response.status_code, response.content


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], proxy: ChatOnlyServer) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close their connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _send_reply(self) -> None:
        assert isinstance(self.server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, content = self.server.proxy.reply(self.command, self.path, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _send_reply

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


if __name__ == "__main__":
    ChatOnlyServer(sys.argv[1], port=int(sys.argv[2])).serve()
