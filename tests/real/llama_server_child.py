"""Runs llama.cpp's own `llama-server` until standard input closes; started by `servers.py`.

The wheel `xllamacpp` holds the compiled server. It is installed in an environment of its own.
"""

from __future__ import annotations

import argparse
import sys

import xllamacpp


def main() -> None:
    """Serve one GGUF file on loopback."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    given = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path = given.model
    settings.port = given.port
    settings.n_ctx = given.context
    settings.n_parallel = 1
    # Several would spin while they wait for one another, which is slow on a busy machine.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.endpoint_metrics = True
    server = xllamacpp.Server(settings)
    print(f"listening at {server.listening_address}", flush=True)  # noqa: T201
    # The server dies with its parent, however that ends.
    sys.stdin.read()


if __name__ == "__main__":
    main()
