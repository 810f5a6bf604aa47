"""The child process of `LocalServer`: `mlx_lm.server` on a socket that its parent opened.

Run as `python -m mlxroute.hosting.mlx_lm_child`. It ends when its standard input is closed, so it
never outlives the parent that holds the other end, however the parent ends.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import urlsplit

from mlxroute.hosting.end_with_parent import end_with_parent

_LOCAL_HOSTS: Final = {"localhost", "127.0.0.1", "::1"}
# No web site has such a name; a container reaches its machine as host.docker.internal.
_PRIVATE_DOMAINS: Final = (".internal", ".localhost")
# Memory for the KV caches of earlier conversations; `mlx_lm` limits only their number.
_PROMPT_CACHE_BYTES: Final = 512 * 2**20


def main() -> None:
    """Serve one model until the parent process ends."""
    end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--socket-fd", type=int, required=True)
    options = parser.parse_args()

    from mlxroute.backend import blas

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    sys.stderr.write(f"{blas.interpose(options.cache_dir)}\n")
    _serve(options.model, listener=socket.socket(fileno=options.socket_fd))


def _serve(model: Path, *, listener: socket.socket) -> None:
    from mlx_lm import server

    class Server(ThreadingHTTPServer):
        """Listens on the socket that the parent has bound."""

        def server_bind(self) -> None:
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()
            self.server_name, self.server_port = "127.0.0.1", listener.getsockname()[1]

    class Handler(_LocalPagesOnly, server.APIHandler):  # type: ignore[misc]
        """Logs no requests, so that the log ends with the last error."""

        def log_request(self, code: object = "-", size: object = "-") -> None:
            pass

    server.load = _load
    server.LRUPromptCache = _prompt_cache_class()
    server._run_http_server = functools.partial(
        server._run_http_server, server_class=Server, handler_class=Handler
    )
    # Whatever model a request names, this one answers: to load another would first drop it.
    served = server.ModelDescription(model="default_model", draft="default_model", adapter=None)
    server.ModelDescription = lambda **_: served
    # Without this, the server also offers every model in the user's hub cache.
    server.scan_cache_dir = lambda: SimpleNamespace(repos=())
    sys.argv = ["mlx_lm.server", "--model", str(model), "--log-level", "WARNING"]
    server.main()


def _prompt_cache_class() -> Any:
    """Return the class that keeps the KV caches of earlier conversations."""
    from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

    class PromptCache(LRUPromptCache):  # type: ignore[misc]
        """Has a limit of bytes, and leaves a token of a prompt uncached.

        Without any token to compute, the generation thread ends.
        """

        def insert_cache(self, *arguments: Any, **named: Any) -> None:
            # Of several kinds, mlx_lm drops one first, however new its caches are.
            super().insert_cache(*arguments, **{**named, "cache_type": "assistant"})
            # The last stays, whatever its size: the next call continues its text.
            while len(self) > 1 and self.nbytes > _PROMPT_CACHE_BYTES:
                self.trim_to(n_sequences=len(self) - 1)

        def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
            cache, rest = super().fetch_nearest_cache(model, tokens)
            if rest:
                return cache, rest
            if not can_trim_prompt_cache(cache):
                return None, tokens
            trim_prompt_cache(cache, 1)
            return cache, tokens[-1:]

    return PromptCache


class _LocalPagesOnly(BaseHTTPRequestHandler):
    """Refuses pages of web sites, also those whose name leads here: mlx_lm answers any page."""

    def parse_request(self) -> bool:
        """Return whether a request can be answered; reply to it if not."""
        if not super().parse_request():
            return False
        if not _is_local(self.headers.get("Origin")):
            self.send_error(403, "pages of web sites may not use this server")
        elif not _is_own_name(self.headers.get("Host")):
            self._refuse_name()
        else:
            return True
        return False

    def _refuse_name(self) -> None:
        """Reply with a reason that clients of the API show."""
        text = "this server answers requests for localhost or 127.0.0.1, not for other names"
        body = json.dumps({"error": {"message": text}}).encode()
        self.close_connection = True
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _is_local(origin: str | None) -> bool:
    """Return whether a request comes from no page, or from one that this machine serves."""
    return origin is None or _host_name(origin) in _LOCAL_HOSTS


def _is_own_name(host: str | None) -> bool:
    """Return whether a Host header is none that a web site has given this machine's address."""
    name = _host_name(f"//{host}").removesuffix(".")
    is_local = name in (*_LOCAL_HOSTS, "0.0.0.0")
    return host is None or is_local or name.endswith(_PRIVATE_DOMAINS)


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _load(path: str, *, adapter_path: str | None = None, **_: object) -> tuple[Any, Any, Any]:
    """Load a model as `mlx_lm`'s `load` does, with weights in the form that suits this machine."""
    from mlxroute.backend.load import load
    from mlxroute.backend.model_files import read_json_object

    adapter = None if adapter_path is None else Path(adapter_path)
    model, tokenizer = load(Path(path), adapter=adapter, full_tokenizer=True)
    return model, tokenizer, read_json_object(Path(path, "config.json"))


if __name__ == "__main__":
    main()
