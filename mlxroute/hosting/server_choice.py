"""The server program for a model: `mlx_lm.server` or llama.cpp's `llama-server`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mlxroute.errors import LaunchError


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A server that runs as a child process.

    Args:
        module: Module of this package that the child runs.
        takes_listening_socket: Whether it serves a socket that its parent listens on. Otherwise it
            binds the socket's port itself.
        arguments: Returns the module's arguments for a model and the cache folder.
    """

    module: str
    takes_listening_socket: bool
    arguments: Callable[[Path, Path], Sequence[str]]


def choose_server(model_path: Path) -> ServerProgram:
    """Return the server for a model directory or a GGUF file.

    Raises LaunchError if llama.cpp is not installed for a GGUF file.
    """
    if not model_path.is_file():
        return _MLX_LM
    check_llama_cpp()
    return _LLAMA_SERVER


def check_llama_cpp() -> None:
    """Raise LaunchError if llama.cpp is not installed."""
    if find_spec("xllamacpp") is None:
        raise LaunchError(
            "llama.cpp is not installed: run `pip install xllamacpp`, or choose the engine mlx",
            parameter="engine",
        )


def server_threads(cores: int) -> int:
    """Return how many threads llama.cpp computes with on a machine of so many cores."""
    return max(1, cores // 2)


def _mlx_lm_arguments(model_path: Path, cache_dir: Path) -> Sequence[str]:
    return ("--model", str(model_path), "--cache-dir", str(cache_dir))


def _llama_server_arguments(model_path: Path, cache_dir: Path) -> Sequence[str]:
    return ("--model", str(model_path), "--threads", str(server_threads(_usable_cores())))


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_MLX_LM = ServerProgram("mlxroute.hosting.mlx_lm_child", True, _mlx_lm_arguments)
_LLAMA_SERVER = ServerProgram("mlxroute.hosting.llama_server_child", False, _llama_server_arguments)
