"""The overhead of a call through `LargeModel` over a plain `requests` call with the same body.

Both call the same loopback server alternately. The server runs in its own process and keeps
connections alive.

    python bench/client_overhead.py --pairs 1000
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import requests

from mlxroute import LargeModel
from mlxroute.statistics import percentile
from mlxroute.types import LargeContext

_PROMPT = "It is a truth universally acknowledged, that a " * 85
_WARM_UP_PAIRS = 50


class _ByteVocabulary:
    """A vocabulary of single bytes."""

    eos_ids = frozenset({256})
    end_id = 256
    bos_text = ""
    size = 257
    template_ids = frozenset({256})

    def piece(self, token_id: int) -> str | None:
        return None

    @property
    def control_names(self) -> frozenset[str]:
        return frozenset()

    @property
    def special_names(self) -> frozenset[str]:
        return frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; the second must not wait for the first to be acknowledged.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        # This reply is also a valid answer to the probe that `connect` sends.
        logprobs = {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1}]}
        choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": logprobs}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        print(server.server_address[1], flush=True)
        server.serve_forever()
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{int(child.stdout.readline())}/v1"
        ours, plain = _measure(url, options.pairs)
    finally:
        child.kill()
        child.wait()
    differences = [1e3 * (a - b) for a, b in zip(ours, plain, strict=True)]
    report = {
        "command": f"python bench/client_overhead.py --pairs {options.pairs}",
        "date": time.strftime("%Y-%m-%d"),
        "pairs": options.pairs,
        "prompt_bytes": len(_PROMPT),
        "overhead_ms": _spread(differences),
        "next_token_ms": _spread([1e3 * value for value in ours]),
        "bare_requests_ms": _spread([1e3 * value for value in plain]),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("mlxroute", "requests", "urllib3")},
    }
    print(json.dumps(report, indent=2))


def _measure(url: str, pairs: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each call through the client and of the plain call after it."""
    request = {"prompt": _PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 5, "model": "m"}
    body = json.dumps(request).encode()
    ids = tuple(_PROMPT.encode())
    context = LargeContext(_PROMPT, token_ids=ids, fragment_ids=(), vocabulary=_ByteVocabulary())
    ours, plain = [], []
    with requests.Session() as session, LargeModel(url, model="m") as large:
        session.trust_env = False
        large.connect(thorough=False)
        for _ in range(_WARM_UP_PAIRS + pairs):
            began_s = time.perf_counter()
            large.next_token(context)
            between_s = time.perf_counter()
            session.post(f"{url}/completions", data=body, timeout=30).json()
            ours.append(between_s - began_s)
            plain.append(time.perf_counter() - between_s)
    return ours[_WARM_UP_PAIRS:], plain[_WARM_UP_PAIRS:]


def _spread(values: list[float]) -> dict[str, float]:
    """Return the median and the 5th and 95th percentile."""
    return {
        "median": round(statistics.median(values), 3),
        "p5": round(percentile(values, 0.05), 3),
        "p95": round(percentile(values, 0.95), 3),
    }


if __name__ == "__main__":
    main()
