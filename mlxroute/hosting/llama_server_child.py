"""The child process of `LocalServer` for a GGUF file: llama.cpp's own `llama-server`.

Run as `python -m mlxroute.hosting.llama_server_child`. The package `xllamacpp` holds the compiled
server. The process ends when its standard input is closed, so it never outlives the parent that
holds the other end; while it loads the file, it ends only once that is done.
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Final

from mlxroute.hosting.end_with_parent import end_with_parent

_CONTEXT_TOKENS: Final = 8192
# Memory for the KV caches of earlier conversations; llama.cpp's own limit is 8 GiB.
_PROMPT_CACHE_MIB: Final = 512
_LOG_WARNINGS: Final = 2
_LOG_WAIT_S: Final = 1.0
_LOAD_WITHOUT_MMAP: Final = 0


def main() -> None:
    """Serve one GGUF file on loopback until the parent process ends."""
    end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--socket-fd", type=int, required=True)
    options = parser.parse_args()
    server = _serve(
        options.model, bound=socket.socket(fileno=options.socket_fd), threads=options.threads
    )
    threading.Event().wait()
    del server


def _serve(model: Path, *, bound: socket.socket, threads: int) -> object:
    import xllamacpp

    port = bound.getsockname()[1]
    # llama.cpp takes no socket. Linux lets it bind the port again while nothing listens on it.
    if sys.platform != "linux":
        bound.close()

    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.model_alias = {model.stem}
    settings.port = port
    settings.n_ctx = _CONTEXT_TOKENS
    # A second slot has a prompt cache of its own: a concurrent call would compute the whole prompt.
    settings.n_parallel = 1
    settings.cache_ram_mib = _PROMPT_CACHE_MIB
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    # Weights are repacked as they are loaded, so a mapped file would be in memory twice.
    settings.load_mode = _LOAD_WITHOUT_MMAP
    settings.verbosity = _LOG_WARNINGS
    settings.ui = False
    settings.endpoint_slots, settings.endpoint_metrics = False, True
    # By default the pages of any web site may use the server.
    settings.cors_origins, settings.cors_origins_explicit = "localhost", True
    try:
        return xllamacpp.Server(settings)
    except RuntimeError:
        # The reason is in llama.cpp's log, which a thread of its own writes.
        time.sleep(_LOG_WAIT_S)
        raise


if __name__ == "__main__":
    main()
