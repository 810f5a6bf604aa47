"""Measure `mlxroute serve` over HTTP, never escalating: one client against `ask`, or several.

    python bench/endpoint_speed.py alone|together [SMALL] [TOKENS] [ROUNDS]

- `alone`: tokens per second of one client over those of `ask`, in turns with the same prompts. Both
  are processes whose output is read token by token; the time to the first token is left out.
- `together`: tokens per second of 4 and of 8 clients over those of one, prompts included.

Prints a line per measurement and JSON at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlxroute.cli.bench_report import read_builtin_prompts

CLIENTS = (4, 8)
COMMAND = (sys.executable, "-m", "mlxroute")
TIMEOUT_S = 600.0


@contextlib.contextmanager
def serving(small: str) -> Iterator[int]:
    """Serve a small model alone; yield the port once requests are answered."""
    arguments = (*COMMAND, "serve", "--offline", "--small", small, "--port", "0")
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rsplit(":", 1)[1].split("/")[0])
            while _get_health(port) != 200:
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()


def _get_health(port: int) -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


def time_endpoint(port: int, prompt: str, tokens: int) -> tuple[int, list[float]]:
    """Return the tokens of a streamed answer, and when its chunks of text came."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}
    times_s, count = [], 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if chunk["choices"][0]["delta"].get("content"):
                times_s.append(time.perf_counter())
            count = chunk.get("mlxroute", {}).get("tokens", count)
    return count, times_s


def time_ask(small: str, prompt: str, tokens: int) -> tuple[int, list[float]]:
    """Return the tokens of an answer of `ask`, and when its lines with text came."""
    flags = ("--offline", "--json", "--small", small, "--max-tokens", str(tokens))
    times_s, count = [], 0
    with subprocess.Popen(
        (*COMMAND, "ask", *flags, prompt), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            value = json.loads(line)
            if value["type"] == "summary":
                count = value["tokens"]
            elif value["text"]:
                times_s.append(time.perf_counter())
    return count, times_s


def speed_after_first(tokens: int, times_s: Sequence[float]) -> float:
    """Return tokens per second after the first token."""
    return (tokens - 1) / (times_s[-1] - times_s[0])


def measure_alone(small: str, prompts: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
    """Compare one client of the endpoint with `ask`, in turns."""
    ratios = []
    with serving(small) as port:
        time_endpoint(port, prompts[0], tokens)
        for number in range(rounds):
            prompt = prompts[number % len(prompts)]
            ask = speed_after_first(*time_ask(small, prompt, tokens))
            endpoint = speed_after_first(*time_endpoint(port, prompt, tokens))
            ratios.append(endpoint / ask)
            print(f"ask {ask:.2f}, endpoint {endpoint:.2f} tokens/s", flush=True)
    return {
        "endpoint_over_ask": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def measure_together(
    small: str, prompts: Sequence[str], tokens: int, rounds: int
) -> dict[str, Any]:
    """Compare several clients with one, in turns."""
    ratios: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    with serving(small) as port:
        for number in range(rounds):
            speeds = {}
            for clients in (1, *CLIENTS):
                # A new beginning, so that no KV cache of an earlier round holds the prompt.
                texts = [f"{number}.{clients} {prompt} At length." for prompt in prompts[:clients]]
                began_s = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    runs = list(pool.map(lambda text: time_endpoint(port, text, tokens), texts))
                seconds = time.perf_counter() - began_s
                speeds[clients] = sum(count for count, _ in runs) / seconds
                print(f"{clients} clients: {speeds[clients]:.2f} tokens/s", flush=True)
            for clients in CLIENTS:
                ratios[clients].append(speeds[clients] / speeds[1])
    return {f"{clients} over 1": round(statistics.median(r), 2) for clients, r in ratios.items()}


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("alone", "together"))
    parser.add_argument("small", nargs="?", default="qwen2.5-coder-0.5b", metavar="SMALL")
    parser.add_argument("tokens", type=int, nargs="?", default=64, metavar="TOKENS")
    parser.add_argument("rounds", type=int, nargs="?", default=5, metavar="ROUNDS")
    given = parser.parse_args()
    prompts = read_builtin_prompts()
    measure = measure_alone if given.kind == "alone" else measure_together
    report = {
        "command": " ".join(["python", "bench/endpoint_speed.py", *sys.argv[1:]]),
        "small": given.small,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "result": measure(given.small, prompts, given.tokens, given.rounds),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
