"""Run llama.cpp's own `llama-server` until standard input closes; started by `servers.py`.

The wheel `xllamacpp` holds the compiled server. It is installed in a separate environment.
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
    options = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path = options.model
    settings.port = options.port
    settings.n_ctx = options.context
    settings.n_parallel = 1
    # Several threads would spin while they wait for each other, which slows a busy machine.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.endpoint_metrics = True
    server = xllamacpp.Server(settings)
    print(f"listening at {server.listening_address}", flush=True)  # noqa: T201
    # Standard input closes when the parent ends, however it ends.
    sys.stdin.read()


if __name__ == "__main__":
    main()
